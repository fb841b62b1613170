"""The same work by megagpt and by datatrove, in CPU-seconds of whole process trees, and what each of them decided."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data_pipeline.bench import corpora
from data_pipeline.document import Document
from data_pipeline.filters.registry import build_filters
from data_pipeline.tokenizer_training import train_bpe
from megagpt.config.load import read_yaml
from megagpt.data.indexed import TokenFile
from megagpt.errors import DataError

DATATROVE = "datatrove[processing,io]==0.10.1"
DATATROVE_NEEDS = (DATATROVE, "spacy", "lxml_html_clean", "requests", "aiohttp")
"""What its defaults import beyond its own extras."""

_BENCH_VOCABULARY = 8192
_TRAINED_ON_DOCUMENTS = 2000


@dataclass(frozen=True)
class Comparison:
    """One piece of work, done by both."""

    case: str
    work: str
    """What was done, in words."""
    ours_cpu_seconds: float
    theirs_cpu_seconds: float
    at_least: float
    """The ratio that is asked for."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What was decided, and where the two differ."""

    @property
    def ratio(self) -> float:
        """How many times less CPU time megagpt takes."""
        return self.theirs_cpu_seconds / self.ours_cpu_seconds


@dataclass(frozen=True)
class Bench:
    """Where the work is done, and by which interpreter datatrove runs."""

    work: Path
    datatrove_python: Path
    presets: Path
    """configs/data/filters."""

    @property
    def assets(self) -> Path:
        """Files that datatrove would download."""
        return self.work / "assets"

    @property
    def fineweb(self) -> dict[str, dict[str, Any]]:
        """The filters of the preset `fineweb`, in datatrove's order."""
        filters: dict[str, dict[str, Any]] = read_yaml(self.presets / "fineweb.yaml")["filters"]
        return filters

    def ours(self, case: str, job: dict[str, Any], stage: str) -> tuple[float, Path]:
        """Run `megagpt data run` up to a stage with one worker; (CPU-seconds, the job's folder)."""
        out = self.work / case / "megagpt"
        shutil.rmtree(out, ignore_errors=True)
        config = self.work / case / "job.yaml"  # JSON is YAML
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps({**job, "out": str(out), "workers": 1}))
        megagpt = Path(sysconfig.get_paths()["scripts"]) / "megagpt"
        command = [str(megagpt), "data", "run", str(config), "--stage", stage]
        seconds, _ = cpu_seconds(command, self.work / case / "megagpt.log")
        return seconds, out

    def theirs(self, case: str, source: Path) -> tuple[float, dict[str, Any]]:
        """Run a case of datatrove_side.py; (CPU-seconds, what it printed)."""
        work = self.work / case / "datatrove"
        shutil.rmtree(work, ignore_errors=True)
        script = Path(__file__).with_name("datatrove_side.py")
        command = [self.datatrove_python, script, case.split("-")[0], source, work, self.assets]
        seconds, printed = cpu_seconds(list(map(str, command)), self.work / case / "datatrove.log")
        result: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return seconds, result


def cpu_seconds(command: Sequence[str], log: Path) -> tuple[float, str]:
    """User and system time of a program and all descendants that it waited for, and what it printed.

    Raises:
        DataError: it failed; the message has the end of what it said.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    printed, said = log.with_suffix(".out"), log.with_suffix(".err")
    with printed.open("wb") as out, said.open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        end = said.read_text(errors="replace")[-2000:] + printed.read_text(errors="replace")[-2000:]
        raise DataError(f"{' '.join(command)}: exit code {process.returncode}: {end}")
    return usage.ru_utime + usage.ru_stime, printed.read_text()


def compare_pages(bench: Bench, archive: Path, times: int, engine: str) -> Comparison:
    """WARC -> text -> English -> FineWeb's filters -> documents on disk."""
    case = f"pages-{engine}"
    source = bench.work / case / "input"
    n_pages, _ = corpora.copy_pages(archive, source, times)
    job = {
        "sources": [str(source)],
        "extract": {"engine": engine, "timeout_seconds": 60.0},
        "filters": bench.fineweb,
        "dedup": {"exact": False, "minhash": False},
    }
    ours, out = bench.ours(case, job, "filter")
    theirs, result = bench.theirs(case, source)
    kept = Counter(_column(out, "filter", "url"))
    both = sum((kept & Counter(result["kept"])).values())
    facts = {"pages": n_pages, "kept_by_us": kept.total(), "kept_by_them": len(result["kept"]), "kept_by_both": both}
    at_least = {"resiliparse": 12.0, "trafilatura": 2.5}[engine]
    return Comparison(case, f"{n_pages} pages: WARC to filtered English documents", ours, theirs, at_least, facts)


def compare_chain(bench: Bench, archive: Path, times: int) -> Comparison:
    """FineWeb's filter chain alone, over texts in memory, in this process and in theirs."""
    source = bench.work / "chain" / "input"
    copied = bench.work / "chain" / "pages"
    corpora.copy_pages(archive, copied, 1)
    job = {"sources": [str(copied)], "language": {"keep": ["en"]}, "filters": {}}
    _, out = bench.ours("chain", job, "filter")
    texts = _column(out, "filter", "text") * times
    rows = [(str(i), text) for i, text in enumerate(texts)]
    corpora.write_shards(source, rows)
    _, result = bench.theirs("chain", source)
    chain = build_filters(bench.fineweb)
    documents = [Document(i, text, "bench") for i, text in enumerate(texts)]
    for document in (Document(0, texts[0], "bench"), Document(1, "", "bench")):
        chain.apply(document)  # compiled code is loaded at the first document
    started = time.process_time()
    for document in documents:
        chain.apply(document)
    ours = time.process_time() - started
    theirs = result["decisions"]
    differing = Counter(
        f"{_first(document.failed)} | {_first(theirs[str(document.doc_id)])}"
        for document in documents
        if bool(document.failed) != bool(theirs[str(document.doc_id)])
    )
    equal = 1 - differing.total() / len(documents)
    facts = {
        "documents": len(documents),
        "documents_per_second": [round(len(documents) / ours), round(len(documents) / result["cpu_seconds"])],
        "equal_decisions": round(equal, 4),
        "kept": [sum(not d.failed for d in documents), sum(not failed for failed in theirs.values())],
        "differences (ours | theirs)": dict(differing.most_common()),
    }
    return Comparison("chain", "FineWeb's filter chain", ours, result["cpu_seconds"], 20.0, facts)


def compare_dedup(bench: Bench, n_base: int) -> Comparison:
    """Exact and MinHash deduplication, from jsonl.zst to the documents that stay."""
    source = bench.work / "dedup" / "input"
    shutil.rmtree(source, ignore_errors=True)
    corpus = corpora.write_corpus(source, n_base)
    job = {"sources": [str(source)], "language": {"enabled": False}, "filters": {}}
    ours, out = bench.ours("dedup", job, "documents")
    theirs, result = bench.theirs("dedup", source)
    kept, their_kept = set(_column(out, "documents", "url")), set(result["kept"])
    facts = {
        "documents": corpus.n_documents,
        "text_MB": round(corpus.text_bytes / 1e6, 1),
        "kept": [len(kept), len(their_kept)],
        "kept_difference": round(abs(len(kept) - len(their_kept)) / len(their_kept), 5),
        "exact_copies_injected": len(corpus.exact_copies),
        "exact_texts_left_twice": [_texts_twice(source, kept), _texts_twice(source, their_kept)],
        "near_copies_kept": [len(kept & corpus.near_copies), len(their_kept & corpus.near_copies)],
    }
    return Comparison("dedup", "exact and MinHash deduplication, end to end", ours, theirs, 20.0, facts)


def compare_tokenize(bench: Bench, n_base: int) -> Comparison:
    """jsonl.zst -> shuffled token file; a tenth of the documents hold the letters of the end-of-text token."""
    source = bench.work / "tokenize" / "input"
    shutil.rmtree(source, ignore_errors=True)
    texts = [text for text, _ in zip(corpora.installed_texts(), range(n_base), strict=False)]
    rows = [(str(i), text if i % 10 else f"{text}\n<|endoftext|>\n{text}") for i, text in enumerate(texts)]
    corpora.write_shards(source, rows)
    bench.assets.mkdir(parents=True, exist_ok=True)
    train_bpe(iter(texts[:_TRAINED_ON_DOCUMENTS]), _BENCH_VOCABULARY).save(str(bench.assets / "tokenizer.json"))
    job = {
        "sources": [str(source)],
        "language": {"enabled": False},
        "filters": {},
        "dedup": {"exact": False, "minhash": False},
        "tokenizer": {"kind": "file", "file": str(bench.assets / "tokenizer.json")},
        "pack": {"name": "bench", "val_fraction": 0.01},
    }
    ours, out = bench.ours("tokenize", job, "manifest")
    theirs, result = bench.theirs("tokenize", source)
    files = [TokenFile.open(out / f"bench_{split}") for split in ("train", "val")]
    separators = sum(int((np.fromfile(out / f"bench_{split}.bin", np.uint16) == 0).sum()) for split in ("train", "val"))
    n_bytes = sum(len(text.encode()) for _, text in rows)
    facts = {
        "documents": len(rows),
        "text_MB": round(n_bytes / 1e6, 1),
        "MB_per_CPU_second": [round(n_bytes / 1e6 / ours, 2), round(n_bytes / 1e6 / theirs, 2)],
        "tokens": [sum(file.n_tokens for file in files), result["tokens"]],
        "spurious_separators": [separators - len(rows), result["separators"] - len(rows)],
    }
    return Comparison("tokenize", "jsonl.zst to shuffled, packed tokens", ours, theirs, 4.0, facts)


def _column(out: Path, stage: str, name: str) -> list[str]:
    """A column of docs.parquet, all shards of a stage."""
    files = sorted((out / "stages" / stage).glob("*/docs.parquet"))
    return [value for file in files for value in pq.read_table(file, columns=[name]).column(name).to_pylist()]


def _texts_twice(source: Path, kept: set[str]) -> int:
    """Documents that are kept although another kept one has the same text."""
    texts = [text for name, text in corpora.read_shards(source) if name in kept]
    return len(texts) - len(set(texts))


def _first(failed: Sequence[str]) -> str:
    return failed[0] if failed else "kept"
