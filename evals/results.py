"""One result file a task: scores with intervals, what they were measured with, and where the rows came from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from evals.caveats import caveats, judged_caveats
from evals.stats import normal_interval, wilson_interval
from megagpt.atomic import write_file
from megagpt.errors import EvalError

FORMAT = 1


@dataclass(frozen=True)
class Metric:
    """One number with its uncertainty; in the file, NaN and unknown are null."""

    value: float
    stderr: float | None = None
    ci95: tuple[float, float] | None = None
    higher_is_better: bool = True


@dataclass(frozen=True)
class TaskResult:
    """What `<task>.json` holds."""

    task: str
    status: Literal["ok", "unavailable"]
    reason: str
    checkpoint: dict[str, Any]
    """run, step, hash."""
    settings: dict[str, Any]
    """n_shots (None: the task's own), limit, batch_size, dtype, max_seq_len."""
    settings_hash: str
    lm_eval_version: str
    task_version: str | None
    data: dict[str, Any]
    """origin, path_or_id, sha256, absent_splits, checksum (`known`: the copy that was checked; `differs`; empty: not
    known; absent in older files)."""
    n_shots: int | None = None
    """Few-shot examples that the prompts really had."""
    n: int = 0
    """Documents scored."""
    n_total: int = 0
    metrics: dict[str, Metric] = field(default_factory=dict)
    chance: float | None = None
    """Accuracy of guessing, over the documents scored."""
    truncated: int = 0
    """Documents whose prompt lost its beginning because it exceeds the model's context."""
    seconds: float = 0.0
    tokens_computed: int = 0
    """Tokens that ran through the model, generated ones included; what scored inputs share counts once."""
    tokens_naive: int = 0
    """What they would be with one input a request."""
    answers_resumed: int = 0
    """Requests whose answers an earlier, killed evaluation had left."""
    answers_damaged: int = 0
    """Lines that it left and that could not be read; those requests ran again."""
    batch_invariant: bool | None = None
    """Whether the scores are the same bit for bit at any batch size, checked on this machine; None: not known."""
    subtasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of a group: name -> n and metrics."""
    splits: dict[str, list[str]] = field(default_factory=dict)
    """`scored`, and of prompts with worked examples `examples`: where each came from. Empty in older files."""
    samples: str | None = None
    """Name of the file of single answers, beside this one."""
    environment: dict[str, Any] = field(default_factory=dict)
    """What it was computed with (`evals.reuse.describe_environment`); empty in files of before it was recorded."""
    generation: dict[str, Any] = field(default_factory=dict)
    """How texts were drawn where the task's definition does not say it: until, max_gen_toks, temperature ..."""
    reused: bool = False
    """Read from an earlier evaluation of the same weights, settings, data and code; not stored."""
    again: str = ""
    """Why an earlier score did not stand for this one; not stored."""

    @property
    def is_judged(self) -> bool:
        """Whether a judge gave the points."""
        return "judge" in self.settings

    def to_json(self) -> bytes:
        """The file's content."""
        content = {"format": FORMAT, **asdict(self)}
        del content["reused"], content["again"]
        return json.dumps(without_nan(content), indent=1, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def read(cls, path: Path) -> TaskResult:
        """Read a result file.

        Raises:
            EvalError: it is damaged or of another format.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError(f"format is not {FORMAT}")
            metrics = {name: metric_from_json(metric) for name, metric in content.pop("metrics").items()}
            return cls(**content, metrics=metrics)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvalError(
                f"{path}: not a result file of format {FORMAT} ({error}); delete it to evaluate again"
            ) from None

    def write(self, folder: Path, samples: Sequence[Mapping[str, Any]] = ()) -> TaskResult:
        """Write the answers first, then the result that names them; each whole or not at all."""
        named = self
        if samples:
            named = replace(self, samples=f"{self.task}.samples.jsonl")
            lines = "".join(json.dumps(without_nan(sample), ensure_ascii=False) + "\n" for sample in samples)
            write_file(folder / f"{self.task}.samples.jsonl", lines.encode())
        write_file(folder / f"{self.task}.json", named.to_json())
        return named


def hash_settings(settings: Mapping[str, Any]) -> str:
    """sha256 of everything beside weights and data that decides a score."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def make_metric(value: float, stderr: float | None, n: int, *, is_proportion: bool, higher_is_better: bool) -> Metric:
    """A metric with Wilson's interval for shares of right answers, the normal one for other means."""
    known = None if stderr is None or math.isnan(stderr) else stderr
    if is_proportion and n:
        return Metric(value, known, wilson_interval(value * n, n), higher_is_better)
    interval = None if known is None else normal_interval(value, known)
    return Metric(value, known, interval, higher_is_better)


def format_table(results: Sequence[TaskResult]) -> Table:
    """One row a metric: score, 95 % interval, chance, documents, shots, cut prompts.

    Below: what is unavailable and why, and what to know beside the scores.
    """
    missing = [f"{result.task}: {result.reason}" for result in results if result.status != "ok"]
    told = [
        f"{result.task}: {line}"
        for result in results
        if result.status == "ok"
        for line in (judged_caveats(result) if result.is_judged else caveats(result))
    ]
    table = Table(caption=escape("\n".join([*missing, *told])), caption_justify="left")
    for column in ("task", "metric", "score", "95% interval", "chance", "n", "shots", "cut"):
        table.add_column(column, overflow="fold")
    for result in results:
        if result.status != "ok":
            table.add_row(result.task, "", "unavailable")
            continue
        for index, (name, metric) in enumerate(result.metrics.items()):
            interval = "" if metric.ci95 is None else f"{metric.ci95[0]:.4f} .. {metric.ci95[1]:.4f}"
            chance = f"{result.chance:.4f}" if result.chance is not None and name.startswith("acc") else ""
            n = f"{result.n}" if result.n == result.n_total else f"{result.n} of {result.n_total}"
            shots = "" if result.n_shots is None else str(result.n_shots)
            first = index == 0
            table.add_row(
                result.task if first else "",
                name,
                f"{metric.value:.4f}",
                interval,
                chance,
                n if first else "",
                shots if first else "",
                str(result.truncated) if first else "",
            )
    return table


def metric_from_json(content: Mapping[str, Any]) -> Metric:
    """A metric as a file has it; null is NaN.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    interval = content.get("ci95")
    value = math.nan if content["value"] is None else float(content["value"])
    bounds = None if interval is None else (float(interval[0]), float(interval[1]))
    return Metric(**{**content, "value": value, "ci95": bounds})


def without_nan(value: Any) -> Any:
    """JSON has no NaN or infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return value
