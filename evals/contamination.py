"""`megagpt eval contamination`: which benchmark documents stand in the tokens that a run was trained on.

A document is dirty where one of its runs of 13 words (of shorter documents 8, or the whole; megagpt/text/ngrams.py has
the rule) stands in a training document, letter case and punctuation aside. A document too short to be told from
ordinary language is neither dirty nor clean. Source: Brown et al. 2020, appendix C.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from evals.contamination_file import CONTAMINATION_FILE, FORMAT
from evals.contamination_scan import Findings, scan_all, write_index
from evals.items import collect_items
from megagpt.atomic import write_file
from megagpt.config.load import load_config
from megagpt.config.schema import TrainingRun
from megagpt.data.indexed import TokenFile
from megagpt.data.manifest import read_manifest
from megagpt.errors import EvalError
from megagpt.text.ngrams import NGRAM, item_ngrams
from megagpt.tokenizer import Tokenizer, open_recorded_tokenizer, open_tokenizer

COMMON_DOCUMENTS = 10
"""A dirty document in more training documents is more likely a quotation or a common phrase than a leak. Source: Brown
et al. 2020, appendix C."""


@dataclass(frozen=True)
class ContaminationRequest:
    """What is looked for, and in what."""

    tasks: tuple[str, ...]
    """Suites and tasks."""
    data_dir: Path | None = None
    """Local benchmark data; what is not there comes from the hub."""
    run_dir: Path | None = None
    """A run, whose data.train is scanned."""
    tokens: tuple[Path, ...] = ()
    """Token files (.bin/.idx pairs without the ending), in place of the run's."""
    listed: Path | None = None
    """contaminated_items.jsonl of a data job."""
    out: Path | None = None
    """File to write; None for <run>/evals/contamination.json."""
    processes: int = 1
    suites_dir: Path = Path("configs/evals")


def find_contamination(request: ContaminationRequest, console: Console) -> Path:
    """Look for the documents of the tasks and write what was found.

    Raises:
        EvalError: nothing to scan, an unknown task, or one whose data cannot be reached.
        DataError: token files that are damaged or name no tokenizer.
        ConfigError: the run's config.yaml does not fit this version.
    """
    out, prefixes, tokenizer = _what_to_scan(request)
    found = collect_items(request.tasks, request.data_dir, request.suites_dir)
    items = found.items
    if not items:
        raise EvalError(f"{', '.join(request.tasks)}: no documents to look for; name tasks of lm-eval")
    listed = None if request.listed is None else _read_list(request.listed)
    ngrams = [item_ngrams(item["texts"]) for item in items]
    with tempfile.TemporaryDirectory() as folder:
        kept = write_index(Path(folder), ngrams, [item["task"] for item in items]).tolist()
        findings = Findings()
        if tokenizer is not None:
            tokenizer.save(Path(folder) / "tokenizer")
            findings = _scan(prefixes, Path(folder), request.processes, console)
    rows = [
        _row(item, how=one.how if left or one.how == "too short" else "shared wording", left=left)
        for item, one, left in zip(items, ngrams, kept, strict=True)
    ]
    for number, hit in findings.items.items():
        share = round(hit.ngrams / kept[number], 4)
        rows[number] |= {"documents": hit.documents, "ngrams_hit": hit.ngrams, "share": share}
        rows[number]["examples"] = [f"{prefix}:{document}" for prefix, document in hit.examples]
    content = {
        "format": FORMAT,
        "ngram": NGRAM,
        "scanned": [_described(prefix) for prefix in prefixes],
        "listed": None if request.listed is None else str(request.listed),
        "data": found.data,
        "leaves": found.leaves,
        "tasks": _tables(rows, listed, scanned=bool(prefixes)),
        "found": [row for row in rows if "documents" in row],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return out


def _what_to_scan(request: ContaminationRequest) -> tuple[Path, list[Path], Tokenizer | None]:
    """The file to write, the token files, and their tokenizer."""
    config = None
    if request.run_dir is not None:
        config_file = request.run_dir / "config.yaml"
        if not config_file.is_file():
            raise EvalError(f"{config_file}: no such file, so {request.run_dir} is not a run's folder; name runs/NAME")
        config = load_config(TrainingRun, [config_file])
    out = request.out or (None if request.run_dir is None else request.run_dir / "evals" / CONTAMINATION_FILE)
    if out is None:
        raise EvalError(
            "nowhere to write to: name the run whose report shall show it (--checkpoint), or a file (--out)"
        )
    prefixes = list(dict.fromkeys(request.tokens))
    if not prefixes and config is not None and request.listed is None:
        train = config.data.train
        prefixes = [train] if isinstance(train, Path) else [item.prefix for item in train]
    if not prefixes and request.listed is None:
        raise EvalError("nothing to look in: name a run (--checkpoint), token files (--tokens) or a list (--listed)")
    tokenizers = [_tokenizer_of(prefix, None if config is None else config.data.tokenizer) for prefix in prefixes]
    others = {tokenizer.fingerprint for tokenizer in tokenizers}
    if len(others) > 1:
        raise EvalError(f"token files of {len(others)} tokenizers: {', '.join(map(str, prefixes))}; scan them apart")
    return out, prefixes, tokenizers[0] if tokenizers else None


def _tokenizer_of(prefix: Path, named: str | None) -> Tokenizer:
    manifest = read_manifest(prefix)
    if manifest is not None:
        return open_recorded_tokenizer(prefix.parent, manifest.tokenizer)
    if named is None:
        raise EvalError(
            f"{prefix.parent}: no manifest.json beside the token files says which tokenizer made them; "
            "name a run whose data.tokenizer does (--checkpoint)"
        )
    return open_tokenizer(named)


def _described(prefix: Path) -> dict[str, Any]:
    file = TokenFile.open(prefix)
    return {"prefix": str(prefix), "tokens": file.n_tokens, "documents": file.n_documents}


def _scan(prefixes: Sequence[Path], folder: Path, processes: int, console: Console) -> Findings:
    total = sum(TokenFile.open(prefix).n_tokens for prefix in prefixes)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(f"{total:,} tokens", total=total)
        return scan_all(prefixes, folder, folder / "tokenizer", processes, lambda n: progress.advance(bar, n))


def _row(item: Mapping[str, Any], *, how: str, left: int) -> dict[str, Any]:
    return {"task": item["task"], "id": item["id"], "how": how, "ngrams": left}


def _tables(
    rows: Sequence[Mapping[str, Any]], listed: Mapping[str, set[str]] | None, *, scanned: bool
) -> dict[str, dict[str, Any]]:
    """By leaf task: which documents are dirty, clean, or cannot be told; what the list names."""
    tables: dict[str, dict[str, Any]] = {}
    for row in rows:
        table = tables.setdefault(
            row["task"], {"items": 0, "dirty": [], "clean": [], "not_matchable": [], "common": 0, "listed": []}
        )
        is_listed = listed is not None and str(row["id"]) in listed.get(row["task"], ())
        is_dirty = "documents" in row if scanned else is_listed
        kind = "dirty" if is_dirty else "clean" if row["ngrams"] else "not_matchable"
        table["items"] += 1
        table[kind].append(row["id"])
        table["common"] += row.get("documents", 0) > COMMON_DOCUMENTS
        if is_listed:
            table["listed"].append(row["id"])
    return tables


def _read_list(path: Path) -> dict[str, set[str]]:
    """Task -> ids, of a data job's contaminated_items.jsonl."""
    found: dict[str, set[str]] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise EvalError(
            f"{path}: cannot be read: {error.strerror}; name a data job's contaminated_items.jsonl"
        ) from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            found.setdefault(row["task"], set()).add(str(row["id"]))
        except (ValueError, KeyError, TypeError) as error:
            raise EvalError(f"{path}:{number}: not a line of contaminated_items.jsonl: {error!r}") from None
    return found
