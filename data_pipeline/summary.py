"""The records of all tasks -> report.json: where every document and every byte went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data_pipeline.config import DataJob
from data_pipeline.dedup.clusters import REASON_EXACT, REASON_NEAR, REMOVED_FILE
from data_pipeline.map_task import REJECTS_FILE
from data_pipeline.stages import TOKENIZER_FOLDER, Records
from data_pipeline.tasks import TaskRecord, check_conservation, total
from megagpt.errors import DataError
from megagpt.tokenizer import open_tokenizer

REPORT_FILE = "report.json"

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
    maps, packed = records["map"], records["pack"][0].counts
    check_between_stages(records)
    text_bytes_in = sum(record.counts.detail["text_bytes_in"] for record in maps)
    cpu_seconds = sum(record.cpu_seconds for stage in records.values() for record in stage)
    return {
        "format": 1,
        "out": str(job.out),
        "name": job.pack.name,
        "run": {
            "wall_seconds": round(wall_seconds, 3),
            "workers": job.workers,
            "ran": dict(ran),
            "reused": dict(reused),
        },
        "stages": [_stage(name, stage) for name, stage in records.items()],
        "throughput": {
            "text_bytes_in": text_bytes_in,
            "cpu_seconds": round(cpu_seconds, 3),
            "text_bytes_per_cpu_second": round(text_bytes_in / cpu_seconds) if cpu_seconds > 0 else 0,
        },
        "sources": _sources(job, records),
        "rejected": _sum(record.counts.rejected for record in maps),
        "failed_rules": _sum(record.counts.detail["failed_rules"] for record in maps),
        "thresholds": maps[0].counts.detail["thresholds"],
        "examples": _examples(job.out, maps),
        "languages": _sum(record.counts.detail["languages"] for record in maps),
        "kept_by_language": _sum(record.counts.detail["kept_by_language"] for record in maps),
        "dedup": _dedup(records),
        "tokenizer": {
            **open_tokenizer(job.out / TOKENIZER_FOLDER).describe(),
            **records["tokenizer"][0].counts.detail,
        },
        "length_histogram": _sum(record.counts.detail["length_histogram"] for record in records["encode"]),
        "splits": packed.detail,
        "damage": _damage(maps),
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
    for before, after in (("map", "signatures"), ("signatures", "clusters"), ("map", "encode"), ("encode", "pack")):
        handed_over, received = total(records[before]).documents_out, total(records[after]).documents_in
        if handed_over != received:
            raise DataError(
                f"{before} handed over {handed_over} documents but {after} received {received}; "
                "this is a defect, please report it"
            )
    if total(records["clusters"]).documents_out != total(records["encode"]).documents_out:
        raise DataError("deduplication and encoding disagree about the documents that stay; please report this")
    for record in records["pack"]:
        check_conservation("pack", record.counts)


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


def _sources(job: DataJob, records: Records) -> dict[str, dict[str, Any]]:
    """The funnel of each source: records -> rejected by rule -> duplicates -> packed documents and tokens."""
    sources: dict[str, dict[str, Any]] = {}
    name_of_shard: dict[int, str] = {}
    for record in records["map"]:
        shard = record.config["shard"]
        name_of_shard[shard["ordinal"]] = shard["source"]
        values = sources.setdefault(shard["source"], _empty_source())
        values["shards"] += 1
        values["shard_bytes"] += shard["size_bytes"]
        values["records"] += record.counts.documents_in
        values["kept"] += record.counts.documents_out
        values["text_bytes_in"] += record.counts.detail["text_bytes_in"]
        values["text_bytes_kept"] += record.counts.detail["text_bytes_kept"]
        values["rejected"] = _sum([values["rejected"], record.counts.rejected])
    removed = pq.read_table(records["clusters"][0].path(job.out, REMOVED_FILE), columns=["doc_id", "reason"])
    shard_of = removed.column("doc_id").to_numpy() >> 32
    reasons = removed.column("reason").to_numpy(zero_copy_only=False)
    for reason in (REASON_EXACT, REASON_NEAR):
        ordinals, numbers = np.unique(shard_of[reasons == reason], return_counts=True)
        for ordinal, number in zip(ordinals.tolist(), numbers.tolist(), strict=True):
            sources[name_of_shard[ordinal]][reason] += number
    for split, values in records["pack"][0].counts.detail.items():
        for name, part in values["sources"].items():
            sources[name]["packed"] += part["documents"]
            sources[name]["tokens"][split] = part["tokens"]
            sources[name]["text_bytes"][split] = part["text_bytes"]
    return sources


def _empty_source() -> dict[str, Any]:
    counted = ("shards", "shard_bytes", "records", "kept", "text_bytes_in", "text_bytes_kept", "packed")
    return {
        **dict.fromkeys(counted, 0),
        REASON_EXACT: 0,
        REASON_NEAR: 0,
        "rejected": {},
        "tokens": {},
        "text_bytes": {},
    }


def _dedup(records: Records) -> dict[str, Any]:
    clusters = records["clusters"][0].counts
    short = sum(record.counts.detail["too_short_for_minhash"] for record in records["signatures"])
    return {
        REASON_EXACT: clusters.rejected[REASON_EXACT],
        REASON_NEAR: clusters.rejected[REASON_NEAR],
        "clusters": clusters.detail["clusters"],
        "cluster_sizes": clusters.detail["cluster_sizes"],
        "too_short_for_minhash": short,
    }


def _damage(maps: Sequence[TaskRecord]) -> dict[str, Any]:
    listed = [damage for record in maps for damage in record.counts.detail["damage"]]
    return {
        "count": sum(record.counts.detail["damage_count"] for record in maps),
        "bytes_lost": sum(record.counts.detail["bytes_lost"] for record in maps),
        "listed": listed[:_DAMAGES_LISTED],
    }


def _examples(out: Path, maps: Sequence[TaskRecord]) -> dict[str, list[dict[str, str]]]:
    """The first few rejects of each reason, from the first shards."""
    examples: dict[str, list[dict[str, str]]] = {}
    for record in maps[:_SHARDS_LOOKED_AT]:
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
