"""`megagpt eval prepare --from hub`: data sets of tasks, loaded once through `datasets` and kept as local folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from evals.benchmarks import BENCHMARKS, Benchmark, Configs
from evals.data import PreparedReport, write_dataset
from evals.prepared import PreparedBenchmark, Record
from evals.scoring import quiet_bars
from evals.task_loader import data_sets, hub_problem
from megagpt.errors import EvalError


def prepare_from_hub(
    tasks: tuple[str, ...], out: Path, on_progress: Callable[[int, int], None] = lambda *_: None
) -> PreparedReport:
    """Write the data sets of tasks as hub-shaped folders below `out`, checked like those of local files.

    Args:
        tasks: names of lm-eval's; `heldout` and megagpt's own have no data set there.
        out: folder to write; `eval run --data` takes it.
        on_progress: told how many configs of data sets are loaded, and of how many.

    What an earlier call wrote into `out` stays, in the record, too. The record is written after each data set, with
    the hash of every file, so that later damage is seen of data sets whose official numbers are not known as well.

    Returns:
        What became of the benchmarks that megagpt knows the numbers of, those of earlier calls among them. A benchmark
        with other numbers than the official ones is refused and not written.

    Raises:
        EvalError: an unknown task, a hub that cannot be reached, or a data set that cannot be loaded; what is
            complete by then stands.
    """
    wanted = data_sets(tasks)
    if (reason := hub_problem()) is not None:
        raise EvalError(f"the hub cannot be reached ({reason}); prepare from a folder, or set HF_ENDPOINT to a mirror")
    total = sum(len(configs) for configs in wanted.values())
    done = 0
    record = Record.read(out)
    shown: dict[str, PreparedBenchmark] = {}
    for hub_id, names in wanted.items():
        configs: Configs = {}
        for name in names:
            configs[name or "default"] = _load(hub_id, name)
            done += 1
            on_progress(done, total)
        known = [benchmark for benchmark in BENCHMARKS.values() if benchmark.hub_id == hub_id]
        judged = {benchmark.name: _judge(benchmark, configs) for benchmark in known}
        refused = {config for found_one, config in _configs_of(judged, configs) if found_one.status == "refused"}
        kept = {name: splits for name, splits in configs.items() if name not in refused}
        written = write_dataset(out, hub_id, kept, record.splits(hub_id)) if kept else {}
        found = {name: _with_files(one, written, configs) for name, one in judged.items()}
        record = _merged(record, hub_id, found, written)
        record.write(out)
        shown |= {name: one for name, one in found.items() if one.status == "refused"}
    return PreparedReport(out, record.benchmarks | shown)


def _merged(before: Record, hub_id: str, found: Mapping[str, PreparedBenchmark], written: Mapping[str, str]) -> Record:
    """The record with one more data set; an earlier benchmark that is whole is replaced only by one that is."""
    benchmarks = {name: before.benchmarks.get(name, _missing(name)) for name in BENCHMARKS}
    benchmarks |= {name: one for name, one in found.items() if one.status == "ok" or benchmarks[name].status != "ok"}
    hashed = {path for one in found.values() for path in one.written_sha256}
    rest = {path: digest for path, digest in written.items() if path not in hashed}
    files = before.others.get(hub_id, {}) | rest
    return Record(benchmarks, before.others | ({hub_id: files} if files else {}))


def _load(hub_id: str, name: str | None) -> dict[str, list[dict[str, Any]]]:
    try:
        with quiet_bars():
            return {str(split): list(rows) for split, rows in datasets.load_dataset(hub_id, name).items()}
    except (OSError, DatasetsError, ValueError, KeyError, ImportError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EvalError(
            f"{hub_id} {name or ''}: cannot be loaded from the hub: {type(error).__name__}: {first}"
        ) from None


def own_configs(benchmark: Benchmark, configs: Mapping[str, Any]) -> list[str]:
    """The configs of a data set that belong to this benchmark, where several share it."""
    fixed = {
        "arc_easy": ["ARC-Easy"],
        "arc_challenge": ["ARC-Challenge"],
        "truthfulqa": ["multiple_choice"],
        "truthfulqa_gen": ["generation"],
    }
    return [name for name in fixed.get(benchmark.name, list(configs)) if name in configs]


def _configs_of(judged: Mapping[str, PreparedBenchmark], configs: Configs) -> list[tuple[PreparedBenchmark, str]]:
    return [(found, config) for name, found in judged.items() for config in own_configs(BENCHMARKS[name], configs)]


def _judge(benchmark: Benchmark, configs: Configs) -> PreparedBenchmark:
    """Compare the numbers of rows in the splits whose official numbers are known."""
    own = own_configs(benchmark, configs)
    if not own:
        return _missing(benchmark.name)
    rows: dict[str, int] = {}
    for config in own:
        for split, found in configs[config].items():
            rows[split] = rows.get(split, 0) + len(found)
    different = {split: n for split, n in benchmark.rows.items() if rows.get(split) != n}
    if different:
        told = ", ".join(f"{rows.get(split, 0)} {split} rows, expected {n}" for split, n in different.items())
        reason = f"{benchmark.hub_id}: {told}: a part of a benchmark is not that benchmark"
        return PreparedBenchmark(benchmark.name, benchmark.hub_id, "refused", reason, rows)
    return PreparedBenchmark(benchmark.name, benchmark.hub_id, "ok", "", rows)


def _with_files(found: PreparedBenchmark, written: Mapping[str, str], configs: Configs) -> PreparedBenchmark:
    own = set(own_configs(BENCHMARKS[found.name], configs)) if found.status == "ok" else set()
    files = {path: digest for path, digest in written.items() if Path(path).parent.name in own}
    return PreparedBenchmark(**{**asdict(found), "written_sha256": files})


def _missing(name: str) -> PreparedBenchmark:
    return PreparedBenchmark(name, BENCHMARKS[name].hub_id, "missing", "not asked for")
