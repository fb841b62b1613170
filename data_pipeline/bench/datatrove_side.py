"""datatrove's side of `megagpt bench data`: run by the Python of its own environment, never imported by megagpt.

    python datatrove_side.py CASE INPUT WORK ASSETS

CASE is pages, chain, dedup or tokenize. Everything is datatrove 0.10.1 with its defaults, put together as in its own
examples fineweb.py, minhash_deduplication.py and exact_dedup. INPUT is a folder of .warc.gz or .jsonl.zst files, one
task a file; ASSETS holds what datatrove would download: lid.176.ftz and tokenizer.json. The last line printed is JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
)
from datatrove.pipeline.readers import JsonlReader, WarcReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.lid import FT176LID
from fsspec.core import strip_protocol
from huggingface_hub import cached_assets_path

_EXTRACTION_SECONDS = 10.0
"""Where both run on a busy machine, datatrove's limit of one second a page would drop pages at random."""


def fineweb_filters() -> list[Any]:
    """The quality filters of examples/fineweb.py, in its order."""
    return [
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
    ]


def run_pages(source: Path, work: Path) -> dict[str, Any]:
    """WARC -> trafilatura -> English -> filters -> jsonl.zst."""
    out = work / "kept"
    pipeline = [
        WarcReader(str(source), glob_pattern="*.warc.gz"),
        Trafilatura(favour_precision=True, timeout=_EXTRACTION_SECONDS),
        LanguageFilter(),
        *fineweb_filters(),
        JsonlWriter(str(out), compression="zstd"),
    ]
    _execute(pipeline, len(list(source.glob("*.warc.gz"))), work / "logs")
    return {"kept": sorted(document.metadata["url"] for document in _read(out))}


def run_chain(source: Path, _work: Path) -> dict[str, Any]:
    """The filters alone over texts in memory, all of them for every document; their decisions and their CPU time."""
    documents = list(_read(source))
    filters = fineweb_filters()
    for each in filters:  # word tokenizers are loaded at the first document
        each.filter(Document(text=documents[0].text, id="warm-up"))
    decisions: dict[str, list[str]] = {}
    started = time.process_time()
    for document in documents:
        failed = []
        for each in filters:
            verdict = each.filter(document)
            if verdict is not True:
                failed.append(f"{type(each).__name__}.{verdict[1] if isinstance(verdict, tuple) else ''}")
                break
        decisions[document.id] = failed
    return {"cpu_seconds": time.process_time() - started, "decisions": decisions}


def run_dedup(source: Path, work: Path) -> dict[str, Any]:
    """Exact, then MinHash deduplication; writes what stays."""
    n_tasks = len(list(source.glob("*.jsonl.zst")))
    exact = ExactDedupConfig(content_getter=lambda document: document.text)
    unique = work / "unique"
    _execute([_reader(source), ExactDedupSignature(str(work / "exact"), exact)], n_tasks, work / "logs1")
    _execute([ExactFindDedups(str(work / "exact"), str(work / "exact_dups"), exact)], 1, work / "logs2")
    _execute(
        [
            _reader(source),
            ExactDedupFilter(str(work / "exact_dups"), exact),
            JsonlWriter(str(unique), output_filename="${rank}.jsonl.gz"),
        ],
        n_tasks,
        work / "logs3",
    )
    near = MinhashConfig()
    reader = JsonlReader(str(unique), glob_pattern="*.jsonl.gz")
    _execute([reader, MinhashDedupSignature(str(work / "signatures"), near)], n_tasks, work / "logs4")
    buckets = MinhashDedupBuckets(str(work / "signatures"), str(work / "buckets"), config=near)
    _execute([buckets], near.num_buckets, work / "logs5")
    _execute([MinhashDedupCluster(str(work / "buckets"), str(work / "remove"), config=near)], 1, work / "logs6")
    out = work / "kept"
    _execute(
        [reader, MinhashDedupFilter(str(work / "remove")), JsonlWriter(str(out), compression="zstd")],
        n_tasks,
        work / "logs7",
    )
    return {
        "unique": sum(1 for _ in JsonlReader(str(unique), glob_pattern="*.jsonl.gz")()),
        "kept": sorted(document.id for document in _read(out)),
    }


def run_tokenize(source: Path, work: Path, tokenizer: Path) -> dict[str, Any]:
    """Texts -> tokens with an end-of-text token after each document, shuffled."""
    out = work / "tokens"
    step = DocumentTokenizer(
        str(out), str(tokenizer), eos_token="<|endoftext|>", local_working_dir=str(work / "tmp"), save_filename="t"
    )
    _execute([_reader(source), step], len(list(source.glob("*.jsonl.zst"))), work / "logs")
    from tokenizers import Tokenizer

    end = Tokenizer.from_file(str(tokenizer)).token_to_id("<|endoftext|>")
    import numpy as np

    tokens = [np.fromfile(path, np.uint16) for path in sorted(out.glob("*.ds"))]
    return {
        "tokens": int(sum(map(len, tokens))),
        "separators": int(sum(int((part == end).sum()) for part in tokens)),
    }


def _execute(pipeline: list[Any], n_tasks: int, logs: Path) -> None:
    LocalPipelineExecutor(pipeline, tasks=n_tasks, workers=1, logging_dir=str(logs), start_method="spawn").run()


def _reader(source: Path) -> JsonlReader:
    return JsonlReader(str(source), glob_pattern="*.jsonl.zst", compression="zstd")


def _read(folder: Path) -> Any:
    return JsonlReader(str(folder), glob_pattern="*.jsonl.zst", compression="zstd")()


def _place_language_model(assets: Path) -> None:
    """Where datatrove looks before it downloads; the quantised model stands in for the large one."""
    folder = Path(cached_assets_path(library_name="datatrove", namespace="lid", subfolder="ft176"))
    target = folder / strip_protocol(FT176LID.MODEL_URL).replace("/", "_")
    if not target.exists():
        shutil.copyfile(assets / "lid.176.ftz", target)
        target.with_name(target.name + ".completed").touch()


def main() -> None:
    """Run one case and print its result."""
    case, source, work, assets = sys.argv[1], *map(Path, sys.argv[2:5])
    match case:
        case "pages":
            _place_language_model(assets)
            result = run_pages(source, work)
        case "chain":
            result = run_chain(source, work)
        case "dedup":
            result = run_dedup(source, work)
        case "tokenize":
            result = run_tokenize(source, work, assets / "tokenizer.json")
        case _:
            raise SystemExit(f"{case}: no such case")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
