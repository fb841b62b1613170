"""The records of all tasks -> report.json: where every document and every byte went."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_pipeline.config import DataJob
from data_pipeline.decontamination import contaminated
from data_pipeline.intake import REJECTS_FILE
from data_pipeline.stages.context import Records, detail_sum
from data_pipeline.stages.tokens import TOKENIZER_FOLDER
from data_pipeline.tasks import TaskRecord, check_conservation, total
from megagpt.errors import DataError
from megagpt.tokenizer import open_tokenizer

REPORT_FILE = "report.json"
REPORT_FORMAT = 2
"""Number of the form of report.json: raised where a reader of the old form would misread the new one."""

LOSING_STAGES = ("extract", "filter", "documents")
"""Stages that reject documents: records = packed + what these lose, for every source."""

_HANDED_ON = (
    ("filter", "signatures"),
    ("signatures", "clusters"),
    ("filter", "documents"),
    ("documents", "encode"),
    ("encode", "pack"),
)
_EXAMPLES_A_REASON = 3
_SHARDS_LOOKED_AT = 50
_DAMAGES_LISTED = 200
_FEW_VAL_DOCUMENTS = 10


def summarise(
    job: DataJob, records: Records, ran: Mapping[str, int], reused: Mapping[str, int], wall_seconds: float
) -> dict[str, Any]:
    """The content of report.json; JSON values only.

    Raises:
        DataError: the stages do not agree about how many documents passed between them.
    """
    filtered, packed = records["filter"], records["pack"][0].counts
    check_between_stages(records)
    text_bytes_in = sum(record.counts.detail["text_bytes_in"] for record in filtered)
    cpu_seconds = sum(record.cpu_seconds for stage in records.values() for record in stage)
    return {
        "format": REPORT_FORMAT,
        "out": str(job.out),
        "name": job.pack.name,
        "run": {
            "wall_seconds": round(wall_seconds, 3),
            "executor": job.executor,
            "workers": job.workers,
            "ran": dict(ran),
            "reused": dict(reused),
        },
        "stages": [_stage(name, stage) for name, stage in records.items() if stage],
        "throughput": {
            "text_bytes_in": text_bytes_in,
            "cpu_seconds": round(cpu_seconds, 3),
            "text_bytes_per_cpu_second": round(text_bytes_in / cpu_seconds) if cpu_seconds > 0 else 0,
        },
        "sources": _sources(records),
        "lost": {name: _sum([total(records[name]).rejected]) for name in LOSING_STAGES},
        "failed_rules": _sum(record.counts.detail["failed_rules"] for record in filtered),
        # In the job's order, which is that of the funnel.
        "thresholds": {
            name: filtered[0].counts.detail["thresholds"][name]
            for name in ("language", *job.filters)
            if name in filtered[0].counts.detail["thresholds"]
        },
        "examples": _examples(job.out, (*records["extract"], *filtered)),
        "languages": _sum(record.counts.detail["languages"] for record in filtered),
        "kept_by_language": _sum(record.counts.detail["kept_by_language"] for record in filtered),
        "lengths": _sum(record.counts.detail["lengths"] for record in filtered),
        "dedup": _dedup(records),
        "contamination": _contamination(job, records),
        "tokenizer": {
            **open_tokenizer(job.out / TOKENIZER_FOLDER).describe(),
            **records["tokenizer"][0].counts.detail,
        },
        "length_histogram": _sum(record.counts.detail["length_histogram"] for record in records["encode"]),
        "splits": packed.detail["splits"],
        "damage": _damage((*records["extract"], *filtered)),
    }


def warnings_of(report: Mapping[str, Any]) -> list[str]:
    """What a person should know before using the token files."""
    warnings = []
    tokenizer = report["tokenizer"]
    asked = tokenizer.get("vocab_size_asked", tokenizer["vocab_size"])
    if tokenizer["vocab_size"] < asked:
        warnings.append(
            f"the tokenizer has {tokenizer['vocab_size']} tokens instead of {asked}: {tokenizer['sample_bytes']} bytes "
            "of text hold no more pairs to merge; add text or lower tokenizer.vocab_size"
        )
    damage = report["damage"]
    if damage["count"]:
        warnings.append(
            f"{damage['count']} damaged place(s) in the sources, {damage['bytes_lost']} bytes lost: see the report"
        )
    if report["splits"]["val"]["documents"] < _FEW_VAL_DOCUMENTS:
        warnings.append(
            f"the validation split has {report['splits']['val']['documents']} document(s) only; "
            "raise pack.val_fraction for a loss that means something"
        )
    for source, values in report["sources"].items():
        if values["records"] and not values["packed"]:
            warnings.append(f"nothing of source {source} is left: {values['records']} records were all rejected")
    return warnings


def check_between_stages(records: Records) -> None:
    """What one stage hands over is what the next one received.

    Raises:
        DataError: documents went missing, or appeared, between two stages.
    """
    pages = {record.partition: record.counts.documents_out for record in records["extract"]}
    for record in records["filter"]:
        if record.partition in pages and pages[record.partition] != record.counts.documents_in:
            _disagree("extract", pages[record.partition], "filter", record.counts.documents_in)
    for before, after in _HANDED_ON:
        handed_over, received = total(records[before]).documents_out, total(records[after]).documents_in
        if handed_over != received:
            _disagree(before, handed_over, after, received)
    for record in records["pack"]:
        check_conservation("pack", record.counts)


def _disagree(before: str, handed_over: int, after: str, received: int) -> None:
    raise DataError(
        f"{before} handed over {handed_over} documents but {after} received {received}; "
        "this is a defect, please report it"
    )


def _stage(name: str, records: Sequence[TaskRecord]) -> dict[str, Any]:
    counts = total(records)
    return {
        "stage": name,
        "tasks": len(records),
        "documents_in": counts.documents_in,
        "documents_out": counts.documents_out,
        "rejected": counts.rejected,
        "cpu_seconds": round(sum(record.cpu_seconds for record in records), 3),
        "wall_seconds": round(sum(record.wall_seconds for record in records), 3),
    }


def _sources(records: Records) -> dict[str, dict[str, Any]]:
    """The funnel of each source: records -> lost by reason -> packed documents and tokens."""
    sources: dict[str, dict[str, Any]] = {}
    extracted = {record.partition for record in records["extract"]}
    for record in records["filter"]:
        shard = record.config["shard"]
        values = sources.setdefault(shard["source"], _empty_source())
        values["shards"] += 1
        values["shard_bytes"] += shard["size_bytes"]
    for stage in LOSING_STAGES:
        for record in records[stage]:
            enters = stage == "extract" or (stage == "filter" and record.partition not in extracted)
            for name, reasons in record.counts.detail["sources"].items():
                values = sources.setdefault(name, _empty_source())
                values["records"] += sum(reasons.values()) if enters else 0
                values["lost"] = _sum([values["lost"], {reason: n for reason, n in reasons.items() if reason}])
    for split, packed in records["pack"][0].counts.detail["splits"].items():
        for name, part in packed["sources"].items():
            sources[name]["packed"] += part["documents"]
            sources[name]["tokens"][split] = part["tokens"]
            sources[name]["text_bytes"][split] = part["text_bytes"]
    for name, values in sources.items():
        if values["records"] != values["packed"] + sum(values["lost"].values()):
            _disagree(f"source {name}", values["records"], "packing", values["packed"])
    return sources


def _empty_source() -> dict[str, Any]:
    return {
        **dict.fromkeys(("shards", "shard_bytes", "records", "packed"), 0),
        "lost": {},
        "tokens": {},
        "text_bytes": {},
    }


def _dedup(records: Records) -> dict[str, Any]:
    clusters = records["clusters"][0].counts
    cut = _sum(record.counts.detail["characters_cut"] for record in records["documents"])
    return {
        "removed": clusters.rejected,
        "clusters": clusters.detail["clusters"],
        "cluster_sizes": clusters.detail["cluster_sizes"],
        "too_short_for_minhash": detail_sum(records["signatures"], "too_short_for_minhash"),
        "characters_cut": cut,
    }


def _contamination(job: DataJob, records: Records) -> dict[str, Any] | None:
    """Benchmark by benchmark, how many items the documents hold; None where nobody looked."""
    if not records["contamination"]:
        return None
    table: dict[str, Any] = json.loads(records["contamination"][0].path(job.out, contaminated.TABLE_FILE).read_bytes())
    return {"action": job.decontamination.action, "ngram": job.decontamination.ngram, "tasks": table}


def _damage(readers: Sequence[TaskRecord]) -> dict[str, Any]:
    listed = [damage for record in readers for damage in record.counts.detail["damage"]]
    return {
        "count": detail_sum(readers, "damage_count"),
        "bytes_lost": detail_sum(readers, "bytes_lost"),
        "listed": listed[:_DAMAGES_LISTED],
    }


def _examples(out: Path, readers: Sequence[TaskRecord]) -> dict[str, list[dict[str, str]]]:
    """The first few rejects of each reason, from the first shards."""
    examples: dict[str, list[dict[str, str]]] = {}
    for record in readers[:_SHARDS_LOOKED_AT]:
        columns = ["reason", "url", "failed", "text"]
        for row in pq.read_table(record.path(out, REJECTS_FILE), columns=columns).to_pylist():
            found = examples.setdefault(row.pop("reason"), [])
            if len(found) < _EXAMPLES_A_REASON:
                found.append(row)
    return dict(sorted(examples.items()))


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    added: Counter[str] = Counter()
    for part in counts:
        added.update(part)
    return dict(added.most_common())
