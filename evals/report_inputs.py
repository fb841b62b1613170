"""What a run's folder, and the data folder it names, hold for the report. What is missing is said, not hidden."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.contamination_file import CONTAMINATION_FILE, Contamination, read_contamination
from evals.live_files import FOLDER, LiveEvaluation, live_files, step_of
from evals.results import TaskResult
from evals.sample_files import GENERATIONS_FILE, read_results, step_folders
from megagpt.checkpoint.store import CheckpointStore
from megagpt.checkpoint.store import read_manifest as read_checkpoint
from megagpt.config.load import load_config
from megagpt.config.schema import TrainingRun
from megagpt.data.manifest import read_manifest
from megagpt.errors import CheckpointError, EvalError

HELDOUT_TASK = "heldout"
DATA_REPORT_FORMAT = 2
"""Of report.json; data_pipeline/summary.py writes it, and a test compares."""

_NUMBERS = (
    *("loss", "val_loss", "grad_norm", "lr", "tokens"),
    *("tokens_per_second", "step_seconds", "mfu", "tasks_seconds"),
)
"""What the report computes with, of a row of metrics.jsonl."""

Row = dict[str, Any]


@dataclass(frozen=True)
class StepEvals:
    """Everything measured on one checkpoint."""

    step: int
    folder: Path
    results: tuple[TaskResult, ...]
    generations: tuple[Row, ...]


@dataclass(frozen=True)
class DataTrail:
    """The token files of the run and how they were made."""

    prefix: Path
    weight: float | None
    """Share in a mixture; None where this is the only one."""
    manifest_hash: str | None
    job_hash: str | None
    entry: Row | None
    """What manifest.json says about this pair."""
    report: Row | None
    """The data job's report.json."""


@dataclass(frozen=True)
class RunFolder:
    """All inputs of a report."""

    run_dir: Path
    config: TrainingRun
    config_text: str
    versions: Row | None
    plan: Row | None
    train_rows: tuple[Row, ...]
    eval_rows: tuple[Row, ...]
    benchmark_rows: tuple[Row, ...]
    """Of metrics.jsonl: evaluations during training."""
    events: tuple[Row, ...]
    evals: tuple[StepEvals, ...]
    """By step, oldest first."""
    live: tuple[LiveEvaluation, ...]
    """What evaluation during training wrote, by step."""
    checkpoints: dict[int, str]
    """Step -> hash of the weights, of every checkpoint that is still there."""
    data: tuple[DataTrail, ...]
    contamination: Contamination | None
    """Benchmark documents in the training tokens; None where nobody has looked."""
    missing: tuple[str, ...]
    """What the report cannot show, and what would provide it."""


def read_run_folder(run_dir: Path) -> RunFolder:
    """Read what there is.

    Raises:
        EvalError: `run_dir` is no run's folder, or one of its files is damaged: names the file and the line.
        ConfigError: config.yaml does not fit this version.
        DataError: a data manifest is damaged.
    """
    config_file = run_dir / "config.yaml"
    if not config_file.is_file():
        raise EvalError(f"{config_file}: no such file, so {run_dir} is not a run's folder; name runs/NAME")
    config = load_config(TrainingRun, [config_file])
    missing: list[str] = []
    rows = _read_rows(run_dir / "metrics.jsonl", missing, "training has written none: no curves")
    return RunFolder(
        run_dir=run_dir,
        config=config,
        config_text=config_file.read_text(encoding="utf-8"),
        versions=_read_json(run_dir / "versions.json", missing, "package versions are not known"),
        plan=_read_json(run_dir / "plan.json", missing, "parameters and batch plan are not known"),
        train_rows=tuple(row for row in rows if "loss" in row),
        eval_rows=tuple(row for row in rows if "val_loss" in row),
        benchmark_rows=tuple(row for row in rows if "tasks_seconds" in row),
        events=tuple(_read_rows(run_dir / "events.jsonl", missing, "starts and restarts are not known")),
        evals=_read_evals(run_dir / "evals", missing),
        live=_read_live(run_dir, rows, missing),
        checkpoints=_read_checkpoints(run_dir / "checkpoints", missing),
        data=_read_data(config, missing),
        contamination=_read_contamination(run_dir / "evals" / CONTAMINATION_FILE, missing),
        missing=tuple(missing),
    )


def _read_json(path: Path, missing: list[str], consequence: str) -> Row | None:
    if not path.is_file():
        missing.append(f"{path}: no such file; {consequence}")
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise EvalError(f"{path}: damaged: {error}") from None
    if not isinstance(content, dict):
        raise EvalError(f"{path}: must hold a JSON object, found {type(content).__name__}")
    return content


def _read_rows(path: Path, missing: list[str], consequence: str) -> list[Row]:
    """JSON lines. The last one may be half there, where a run was killed or is still writing: that is said."""
    if not path.is_file():
        missing.append(f"{path}: no such file; {consequence}")
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                missing.append(f"{path}:{number}: the last line is incomplete (killed, or still writing); left out")
                break
            raise EvalError(f"{path}:{number}: not valid JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise EvalError(f"{path}:{number}: must be a JSON object with a whole number `step`, got {line[:80]!r}")
        _check_numbers(row, f"{path}:{number}")
        rows.append(row)
    return rows


def _check_numbers(row: Mapping[str, Any], where: str) -> None:
    for key in _NUMBERS:
        value = row.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise EvalError(f"{where}: {key} must be a number, got {value!r}")
    if "loss" in row and row["loss"] is None:
        raise EvalError(f"{where}: loss must be a number, got null")


def _read_evals(folder: Path, missing: list[str]) -> tuple[StepEvals, ...]:
    found = [
        StepEvals(step, path, read_results(path), _read_generations(path / GENERATIONS_FILE))
        for step, path in step_folders(folder)
    ]
    if not any(evals.results for evals in found):
        missing.append(f"{folder}: no scores; `megagpt eval run --checkpoint {folder.parent}` makes them")
    if not any(evals.generations for evals in found):
        missing.append(f"{folder}: no sample texts; `megagpt report {folder.parent} --samples` makes them")
    return tuple(found)


def _read_live(run_dir: Path, rows: Sequence[Row], missing: list[str]) -> tuple[LiveEvaluation, ...]:
    """A damaged file costs its own points, and so does one of steps that the run then made again."""
    counted = {row["step"] for row in rows if "tasks_seconds" in row}
    found: list[LiveEvaluation] = []
    for path in live_files(run_dir):
        if rows and step_of(path) not in counted:
            missing.append(
                f"{path}: metrics.jsonl has no evaluation at this step: it was killed, or the run went back; left out"
            )
            continue
        try:
            found.append(LiveEvaluation.read(path))
        except EvalError as error:
            missing.append(f"{error}; left out of the curves")
    for note in dict.fromkeys(note for evaluation in found for note in evaluation.notes):
        steps = [evaluation.step for evaluation in found if note in evaluation.notes]
        missing.append(
            f"{run_dir / 'evals' / FOLDER}: left out of {len(steps)} files of an older version "
            f"(step {steps[0]:,} to {steps[-1]:,}): {note}"
        )
    read = {evaluation.step for evaluation in found}
    absent = sorted(counted - read - {step_of(path) for path in live_files(run_dir)})
    if absent:
        some = ", ".join(f"{step:,}" for step in absent[:5]) + (" ..." if len(absent) > 5 else "")
        missing.append(
            f"{run_dir / 'evals' / FOLDER}: no file of {len(absent)} evaluations that metrics.jsonl has (step {some})"
        )
    return tuple(found)


def _read_contamination(path: Path, missing: list[str]) -> Contamination | None:
    if path.is_file():
        return read_contamination(path)
    run_dir = path.parent.parent
    missing.append(
        f"{path}: no such file; whether the training tokens hold benchmark documents is not known; "
        f"`megagpt eval contamination --checkpoint {run_dir} --tasks ...` finds out"
    )
    return None


def _read_generations(path: Path) -> tuple[Row, ...]:
    if not path.is_file():
        return ()
    try:
        content = json.loads(path.read_bytes())
        rows = content["samples"] if isinstance(content, dict) else content
        return tuple({key: str(row[key]) for key in ("prompt", "text", "sampling", "reason")} for row in rows)
    except (ValueError, KeyError, TypeError) as error:
        raise EvalError(f"{path}: damaged ({error!r}); delete it to generate again") from None


def _read_checkpoints(folder: Path, missing: list[str]) -> dict[int, str]:
    store = CheckpointStore(folder)
    hashes = {}
    for step in store.steps():
        try:
            hashes[step] = read_checkpoint(store.step_dir(step)).hash
        except CheckpointError as error:
            missing.append(str(error))
    if not hashes:
        missing.append(f"{folder}: no complete checkpoint")
    return hashes


def _read_data_report(path: Path, missing: list[str]) -> Row | None:
    report = _read_json(path, missing, "what the filters removed is not known")
    if report is not None and report.get("format") != DATA_REPORT_FORMAT:
        raise EvalError(
            f"{path}: format {report.get('format')!r}; this version reads data reports of format {DATA_REPORT_FORMAT}; "
            "run the data job again, which reuses what has not changed"
        )
    return report


def _read_data(config: TrainingRun, missing: list[str]) -> tuple[DataTrail, ...]:
    train = config.data.train
    shares = [(train, None)] if isinstance(train, Path) else [(item.prefix, item.weight) for item in train]
    trails = []
    for prefix, weight in shares:
        manifest = read_manifest(prefix)
        entry = manifest.files.get(prefix.name) if manifest is not None else None
        if manifest is None:
            missing.append(f"{prefix.parent}: no manifest.json; what the tokens were made from is not known")
        trails.append(
            DataTrail(
                prefix=prefix,
                weight=weight,
                manifest_hash=manifest.hash if manifest is not None else None,
                job_hash=manifest.job_hash if manifest is not None else None,
                entry={"tokens": entry.n_tokens, "documents": entry.n_documents} if entry is not None else None,
                report=_read_data_report(prefix.parent / "report.json", missing),
            )
        )
    return tuple(trails)
