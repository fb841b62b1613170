"""Benchmark data on disk: from the public files to folders shaped like the hub's, checked before anything is scored.

    OUT/prepared.json                            what was read, counts and hashes; written last
    OUT/<org>/<name>/README.md                   the data set's card: which file is which split
    OUT/<org>/<name>/<config>/<split>.jsonl

A split that the files do not have stays absent: it is never filled with rows of another.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from evals.benchmarks import BENCHMARKS, Benchmark, Configs
from evals.mt_bench.data import copy_files as copy_mt_bench
from evals.mt_bench.data import describe as describe_mt_bench
from evals.prepared import PREPARED, PreparedBenchmark, Record, damaged, sha256_of, tell_damage
from evals.sandbox.run import probe
from megagpt.atomic import write_file
from megagpt.errors import EvalError


@dataclass(frozen=True)
class PreparedReport:
    """What a source folder holds."""

    source: Path
    benchmarks: dict[str, PreparedBenchmark]

    def table(self) -> Table:
        """One row a benchmark."""
        table = Table(title=f"benchmark data in {self.source}", title_justify="left")
        for column in ("benchmark", "status", "rows", "sha256", "what to do"):
            table.add_column(column, overflow="fold")
        for found in self.benchmarks.values():
            benchmark = BENCHMARKS[found.name]
            rows = ", ".join(f"{split} {n}" for split, n in found.rows.items())
            absent = f"; no {', '.join(found.absent_splits)}" if found.status == "ok" and found.absent_splits else ""
            table.add_row(found.name, found.status, rows + absent, found.checksum, _advice(found, benchmark))
        return table


def prepare(source: Path, out: Path) -> PreparedReport:
    """Write every complete benchmark below `source` as hub-shaped folders below `out`.

    A benchmark whose rows are not the official number is refused, the others are written.

    Raises:
        EvalError: `source` is no folder, or holds none of the benchmarks.
    """
    report, contents = _read_all(source)
    if not contents:
        raise EvalError(_nothing_in(source, report))
    by_hub_id: dict[str, Configs] = {}
    for name, configs in contents.items():
        by_hub_id.setdefault(BENCHMARKS[name].hub_id, {}).update(configs)
    # What came from the hub has no source files here that could have changed: it stands.
    before = Record.read(out)
    from_hub = {name: one for name, one in before.benchmarks.items() if one.status == "ok" and not one.source_sha256}
    earlier = Record({name: one for name, one in from_hub.items() if name not in contents}, before.others)
    written = {
        hub_id: write_dataset(out, hub_id, configs, earlier.splits(hub_id)) for hub_id, configs in by_hub_id.items()
    }
    benchmarks = {
        name: earlier.benchmarks.get(name, found)
        if found.status != "ok"
        else replace(
            found,
            written_sha256={
                path: digest
                for path, digest in written[found.hub_id].items()
                if Path(path).parent.name in contents[name]
            },
        )
        for name, found in report.benchmarks.items()
    }
    copy_mt_bench(source, out)
    Record(benchmarks, before.others).write(out)
    refused = {name: found for name, found in report.benchmarks.items() if found.status == "refused"}
    return PreparedReport(source, benchmarks | refused)


def write_dataset(
    out: Path, hub_id: str, configs: Configs, earlier: Mapping[str, Sequence[str]] | None = None
) -> dict[str, str]:
    """Write one data set as `datasets.load_dataset(out / hub_id, config)` reads it; counts are the caller's affair.

    Args:
        out: folder of data sets.
        hub_id: `org/name`.
        configs: what is written.
        earlier: config -> splits that lie there and stay; the card names them too.

    Returns:
        File below `out` -> sha256.
    """
    folder = out / hub_id
    hashes = {}
    card = ["---", "configs:"]
    for config, names in {**(earlier or {}), **configs}.items():
        card += [f"- config_name: {config}", "  data_files:"]
        card += [line for split in names for line in (f"  - split: {split}", f"    path: {config}/{split}.jsonl")]
    for config, splits in configs.items():
        for split, rows in splits.items():
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            write_file(folder / config / f"{split}.jsonl", content)
            hashes[f"{hub_id}/{config}/{split}.jsonl"] = hashlib.sha256(content).hexdigest()
    write_file(folder / "README.md", "\n".join([*card, "---", ""]).encode())
    return hashes


def locate(hub_id: str, data_dir: Path, cache_dir: Path) -> Path | None:
    """The absolute path of a data set below the user's data folder; None where it is not there.

    Args:
        hub_id: `org/name`, the dataset_path of a task's definition.
        data_dir: a prepared folder, any folder of hub-shaped data sets, or one with the public files.
        cache_dir: public files are prepared below it, again only when they have changed.

    Raises:
        EvalError: the folder is missing, or the benchmark in it is refused.
    """
    if not data_dir.is_dir():
        raise EvalError(f"{data_dir}: no such folder of benchmark data")
    wanted = [benchmark for benchmark in BENCHMARKS.values() if benchmark.hub_id == hub_id]
    direct = data_dir / hub_id
    if direct.is_dir():
        if (data_dir / PREPARED).is_file():
            record = Record.read(data_dir)
            checked = record.checked(data_dir)
            _check_not_refused([checked[benchmark.name] for benchmark in wanted if benchmark.name in checked])
            if bad := damaged(data_dir, record.others.get(hub_id, {})):
                raise EvalError(tell_damage(data_dir, bad))
        return direct.resolve()
    if not any((data_dir / benchmark.folder).is_dir() for benchmark in wanted):
        return None
    prepared_dir = cache_dir / "prepared" / hashlib.sha256(str(data_dir.resolve()).encode()).hexdigest()[:16]
    benchmarks = _prepared_before(data_dir, prepared_dir) or prepare(data_dir, prepared_dir).benchmarks
    found = [benchmarks[benchmark.name] for benchmark in wanted]
    _check_not_refused(found)
    return (prepared_dir / hub_id).resolve() if any(benchmark.status == "ok" for benchmark in found) else None


def _check_not_refused(found: list[PreparedBenchmark]) -> None:
    refused = [benchmark.reason for benchmark in found if benchmark.status == "refused"]
    if refused:
        raise EvalError("; ".join(refused))


def data_hash(folder: Path, configs: set[str]) -> str:
    """sha256 over the names and hashes of the rows' files: all of those configs that are folders, else of the whole."""
    roots = [folder / config for config in configs if (folder / config).is_dir()] or [folder]
    files = sorted({path for root in roots for path in root.rglob("*") if path.is_file()})
    lines = [f"{path.relative_to(folder)} {sha256_of([path])}\n" for path in files if ".cache" not in path.parts]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def doctor(data_dir: Path | None) -> str:
    """What is there, counts, hashes, what is missing and how to get it; and whether this host has the sandbox."""
    console = Console(file=io.StringIO(), width=120, record=True)
    if data_dir is not None:
        report = _read_prepared(data_dir) if (data_dir / PREPARED).is_file() else _read_all(data_dir)[0]
        console.print(report.table())
        for line in (describe_mt_bench(data_dir), *_other_data_sets(data_dir)):
            console.print(line, highlight=False, markup=False)
    console.print(str(probe()), highlight=False, markup=False)
    return console.export_text()


def _other_data_sets(data_dir: Path) -> list[str]:
    """Hub-shaped folders of data sets without official numbers: a line of files and hash each, and what is damaged."""
    record = Record.read(data_dir)
    known = {benchmark.hub_id for benchmark in BENCHMARKS.values()}
    lines = []
    for card in sorted(data_dir.glob("*/*/README.md")):
        hub_id = str(card.parent.relative_to(data_dir))
        if hub_id not in known:
            files = sorted(str(path.relative_to(card.parent)) for path in card.parent.rglob("*.jsonl"))
            line = f"{hub_id}: {', '.join(files) or 'no jsonl files'}; sha256 {data_hash(card.parent, set())[:16]}"
            recorded = record.others.get(hub_id)
            lines.append(line if recorded is None else f"{line}; {_damage(data_dir, recorded)}")
    missing = [hub_id for hub_id in record.others if not (data_dir / hub_id / "README.md").is_file()]
    return lines + [f"{hub_id}: {_damage(data_dir, record.others[hub_id])}" for hub_id in missing]


def _damage(data_dir: Path, recorded: Mapping[str, str]) -> str:
    bad = damaged(data_dir, recorded)
    return f"REFUSED: {tell_damage(data_dir, bad)}" if bad else "as it was written"


def _read_all(source: Path) -> tuple[PreparedReport, dict[str, Configs]]:
    if not source.is_dir():
        raise EvalError(f"{source}: no such folder of benchmark data")
    found: dict[str, PreparedBenchmark] = {}
    contents: dict[str, Configs] = {}
    for name, benchmark in BENCHMARKS.items():
        found[name], configs = _read_one(source / benchmark.folder, benchmark)
        if configs is not None:
            contents[name] = configs
    return PreparedReport(source, found), contents


def _read_one(folder: Path, benchmark: Benchmark) -> tuple[PreparedBenchmark, Configs | None]:
    name, hub_id = benchmark.name, benchmark.hub_id
    missing = [pattern for pattern in benchmark.files if not any(folder.glob(pattern))]
    if missing:
        return PreparedBenchmark(name, hub_id, "missing", f"{folder}: no {', '.join(missing)}"), None
    hashes = _source_hashes(folder, benchmark)
    checksum: Literal["known", "differs"] = "known" if hashes == benchmark.sha256 else "differs"
    try:
        configs = benchmark.read(folder)
    except EvalError as error:
        return PreparedBenchmark(name, hub_id, "refused", str(error), {}, hashes, checksum), None
    rows = _count(configs)
    if rows != benchmark.rows:
        reason = f"{folder}: {_say(rows)}, expected {_say(benchmark.rows)}: a part of a benchmark is not that benchmark"
        return PreparedBenchmark(name, hub_id, "refused", reason, rows, hashes, checksum), None
    complete = PreparedBenchmark(name, hub_id, "ok", "", rows, hashes, checksum, absent_splits=benchmark.absent_splits)
    return complete, configs


def _prepared_before(source: Path, out: Path) -> dict[str, PreparedBenchmark] | None:
    """What an earlier call wrote, where neither its sources nor its files have changed."""
    if not (out / PREPARED).is_file():
        return None
    benchmarks = _read_prepared(out).benchmarks
    before = {name: found.source_sha256 for name, found in benchmarks.items()}
    now = {name: _source_hashes(source / benchmark.folder, benchmark) for name, benchmark in BENCHMARKS.items()}
    is_damaged = any(damaged(out, found.written_sha256) for found in benchmarks.values())
    return None if before != now or is_damaged else benchmarks


def _read_prepared(folder: Path) -> PreparedReport:
    """The record of `prepare`, each written file compared with its hash.

    Raises:
        EvalError: the record cannot be read.
    """
    return PreparedReport(folder, Record.read(folder).checked(folder))


def _source_hashes(folder: Path, benchmark: Benchmark) -> dict[str, str]:
    """Hashes of a complete set of source files; empty where one is missing."""
    found = [sorted(folder.glob(pattern)) for pattern in benchmark.files]
    files = [path for paths in found for path in paths]
    if not all(found):
        return {}
    if "*" in benchmark.sha256:
        return {"*": sha256_of(files)}
    return {path.name: sha256_of([path]) for path in files}


def _count(configs: Configs) -> dict[str, int]:
    rows: dict[str, int] = {}
    for splits in configs.values():
        for split, found in splits.items():
            rows[split] = rows.get(split, 0) + len(found)
    return rows


def _say(rows: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {split} rows" for split, n in rows.items())


def _advice(found: PreparedBenchmark, benchmark: Benchmark) -> str:
    if found.status == "missing":
        files = ", ".join(benchmark.files)
        return f"get {files} from {benchmark.origin} into {benchmark.folder}/, or let the hub serve {benchmark.hub_id}"
    if found.status == "refused":
        return found.reason
    return "" if found.checksum == "known" else f"not the copy that was checked ({benchmark.origin}); scores may differ"


def _nothing_in(source: Path, report: PreparedReport) -> str:
    reasons = "; ".join(f"{found.name}: {found.reason}" for found in report.benchmarks.values())
    return f"{source}: no complete benchmark to prepare. {reasons}"
