"""`megagpt bench data`: every comparison that was asked for, as a table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_pipeline.bench.against_datatrove import (
    DATATROVE,
    DATATROVE_NEEDS,
    Bench,
    Comparison,
    compare_chain,
    compare_dedup,
    compare_pages,
    compare_tokenize,
)
from data_pipeline.bench.grouping import measure_grouping
from data_pipeline.language import default_model
from data_pipeline.sources.python_docs import build_python_docs
from megagpt.errors import ConfigError, DataError

CASES = ("pages-resiliparse", "pages-trafilatura", "chain", "dedup", "tokenize")
_DOCS_PACKAGES = ("numpy", "pyarrow", "torch")
"""Whose documentation stands in for a crawl where no pages are given."""


@dataclass(frozen=True)
class BenchRequest:
    """What to measure."""

    against: str | None
    """`datatrove`, or None: no comparison."""
    cases: tuple[str, ...]
    """Of CASES; empty: all."""
    pages: Path | None
    """A .warc.gz with pages; None: the documentation of some installed packages, as pages."""
    python: Path | None
    """The interpreter of an environment with datatrove; None: one is made in `work`."""
    documents: int
    """Base documents of the corpora for `dedup` and `tokenize`."""
    grouping: int | None
    """Band rows to group under the memory limit."""
    work: Path
    """Folder for inputs, outputs and datatrove's environment; kept."""
    presets: Path
    """configs/data/filters."""


def run_bench(request: BenchRequest, console: Console) -> dict[str, Any]:
    """Measure each case on both sides, one after the other, with one worker each.

    Returns:
        What --json writes: one object a case, and the machine.

    Raises:
        ConfigError: nothing is asked for, or an unknown case.
        DataError: a program failed, or the environment cannot be made.
    """
    unknown = sorted(set(request.cases) - set(CASES))
    if unknown or (request.against is None and request.grouping is None):
        asked = f"no case is called {unknown[0]!r}" if unknown else "nothing to measure"
        raise ConfigError(f"{asked}; say --against datatrove [--case {'|'.join(CASES)}] or --grouping ROWS")
    request.work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    }
    if request.grouping is not None:
        result["grouping"] = measure_grouping(request.grouping, request.work / "grouping")
        console.print(json.dumps(result["grouping"], indent=1), highlight=False)
    if request.against is not None:
        done = list(_compare(request, console))
        console.print(_table(done))
        result["against"] = DATATROVE
        result["cases"] = [{**asdict(each), "ratio": round(each.ratio, 2)} for each in done]
    return result


def _compare(request: BenchRequest, console: Console) -> Iterator[Comparison]:
    work = request.work.resolve()
    bench = Bench(work, request.python or make_environment(work / "datatrove_env", console), request.presets)
    bench.assets.mkdir(exist_ok=True)
    shutil.copyfile(default_model(), bench.assets / "lid.176.ftz")

    def archive() -> Path:
        return request.pages or build_python_docs(work / "pages", _DOCS_PACKAGES).pages[0]

    measure: dict[str, Callable[[], Comparison]] = {
        "pages-resiliparse": lambda: compare_pages(bench, archive(), 6, "resiliparse"),
        "pages-trafilatura": lambda: compare_pages(bench, archive(), 2, "trafilatura"),
        "chain": lambda: compare_chain(bench, archive(), 3),
        "dedup": lambda: compare_dedup(bench, request.documents),
        "tokenize": lambda: compare_tokenize(bench, request.documents),
    }
    for case in request.cases or CASES:
        console.print(f"{case} ...", highlight=False)
        comparison = measure[case]()
        console.print(json.dumps(comparison.facts, indent=1), highlight=False, soft_wrap=True)
        yield comparison


def make_environment(folder: Path, console: Console) -> Path:
    """An environment with datatrove alone, made where it is missing; its interpreter.

    Raises:
        DataError: pip cannot install it.
    """
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        console.print(f"making {folder} with {DATATROVE}; datatrove's pins do not go with megagpt's", highlight=False)
        venv.create(folder, clear=True, with_pip=True)
        done = subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", *DATATROVE_NEEDS],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise DataError(
                f"{folder}: {DATATROVE} cannot be installed with {sys.executable}: {done.stderr[-1000:]}; "
                "make an environment that has it and name its interpreter with --python"
            )
        (folder / "ready").touch()
    return python


def _table(comparisons: Sequence[Comparison]) -> Table:
    table = Table(title=f"CPU-seconds, megagpt and {DATATROVE}")
    for column in ("work", "megagpt", "datatrove", "ratio", "asked for"):
        table.add_column(column, justify="left" if column == "work" else "right")
    for row in _rows(comparisons):
        table.add_row(*row)
    return table


def _rows(comparisons: Sequence[Comparison]) -> Iterator[tuple[str, ...]]:
    for done in comparisons:
        yield (
            f"{done.case}: {done.work}",
            f"{done.ours_cpu_seconds:.2f}",
            f"{done.theirs_cpu_seconds:.2f}",
            f"{done.ratio:.1f}x",
            f">= {done.at_least:g}x",
        )
