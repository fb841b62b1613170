"""What evaluation during training leaves in a run: one file an evaluation, evals/training/step_<step>.json."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from evals.gold import GoldScores
from evals.results import Metric, metric_from_json, without_nan
from evals.sample_files import LEAST_CLUSTERS
from megagpt.atomic import write_file
from megagpt.errors import EvalError

FORMAT = 1
REVISION = 2
"""Of what the numbers mean. 1: of truthfulqa_mc2 the first answer counted as the only right one, and intervals of a
group such as MMLU took its documents for independent; neither is read."""
FOLDER = "training"
"""Of the run's evals/."""

_OPTIONAL = ("margin", "bits_per_byte_stderr", "margin_stderr")
_FILE = re.compile(r"step_(\d+)\.json")


@dataclass(frozen=True)
class LiveTask:
    """One task at one step."""

    task: str
    limit: int
    """Documents of each of its tasks, at most."""
    status: Literal["ok", "unavailable"]
    reason: str = ""
    """Why it could not be scored."""
    n: int = 0
    """Documents scored."""
    n_total: int = 0
    n_shots: int | None = None
    """None where the tasks of a group differ."""
    chance: float | None = None
    truncated: int = 0
    metrics: dict[str, Metric] = field(default_factory=dict)
    gold: GoldScores | None = None
    seconds: float = 0.0

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """As a file has it.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is none.
        """
        metrics = {name: metric_from_json(metric) for name, metric in content.get("metrics", {}).items()}
        gold = content.get("gold")
        found = cls(**{**content, "metrics": metrics, "gold": None if gold is None else _gold(gold)})
        if found.status not in ("ok", "unavailable"):
            raise ValueError(f"status is {found.status!r}")
        for name in ("limit", "n", "n_total", "truncated"):
            if not isinstance(getattr(found, name), int):
                raise TypeError(f"{name} is {getattr(found, name)!r}")
        return found


@dataclass(frozen=True)
class LiveEvaluation:
    """All tasks at one step."""

    step: int
    tasks: tuple[LiveTask, ...]
    notes: tuple[str, ...] = ()
    """What was left out of a file of an older version; not stored."""

    def write(self, run_dir: Path) -> None:
        """Write the file, whole or not at all."""
        path = run_dir / "evals" / FOLDER / f"step_{self.step:08d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "revision": REVISION, **asdict(self)}
        del content["notes"]
        write_file(path, (json.dumps(without_nan(content), indent=1) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            EvalError: it is damaged, of another format, or of another step than its name says.
        """
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != FORMAT:
                raise ValueError(f"format is {content['format']!r}, this version reads {FORMAT}")
            if content["step"] != step_of(path):
                raise ValueError(f"it is of step {content['step']!r}")
            tasks = tuple(LiveTask.from_json(task) for task in content["tasks"])
            if content.get("revision", 1) >= REVISION:
                return cls(content["step"], tasks)
            read = [_of_revision_1(task) for task in tasks]
            return cls(content["step"], tuple(task for task, _ in read), tuple(n for _, notes in read for n in notes))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvalError(f"{path}: no evaluation during training can be read from it ({error!r})") from None


def step_of(path: Path) -> int | None:
    """The step in a file's name; None of other files."""
    match = _FILE.fullmatch(path.name)
    return None if match is None else int(match[1])


def live_files(run_dir: Path) -> list[Path]:
    """A run's files, by step."""
    folder = run_dir / "evals" / FOLDER
    found = [(step, path) for path in folder.glob("step_*.json") if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found)]


def _of_revision_1(task: LiveTask) -> tuple[LiveTask, list[str]]:
    """The task without what an older version got wrong, and what that is."""
    notes = []
    if task.gold is not None and task.gold.margin is not None and task.chance is None:  # not one right answer each
        notes.append(f"{task.task}'s right answers: its first one counted as the only one")
        task = replace(task, gold=None)
    if task.n > task.limit * (LEAST_CLUSTERS - 1) and any(metric.ci95 for metric in task.metrics.values()):
        notes.append(f"{task.task}'s intervals: its documents counted as independent")
        bare = {name: replace(metric, stderr=None, ci95=None) for name, metric in task.metrics.items()}
        task = replace(task, metrics=bare)
    return task, notes


def _gold(content: Mapping[str, Any]) -> GoldScores:
    """Of files of older versions, too, which have no standard errors."""
    known = {name: None if content.get(name) is None else float(content[name]) for name in _OPTIONAL}
    bits = content["bits_per_byte"]  # null: not a number, of a model that diverged
    return GoldScores(n=int(content["n"]), bits_per_byte=math.nan if bits is None else float(bits), **known)
