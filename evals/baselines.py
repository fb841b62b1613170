"""Published scores of other models, and which of them a score of ours may stand beside.

A score is comparable where task, metric, number of shots and the definition (prompt and normalisation) are the same.
`acc` and `acc_norm` of one task differ by up to 17 points, MMLU's two prompts by 5: what is defined otherwise is never
in the same row, column or chart.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.errors import EvalError

BASELINES_FILE = Path(__file__).with_name("baselines.json")
FORMAT = 1
OURS = "lm_eval"
"""The definition that our own scores have."""

PARAMETERS_FACTOR = 1.5
"""Models of equal size: the larger has at most so many times the parameters of the smaller."""
COMPUTE_FACTOR = 2.0
"""Likewise of training FLOPs, 6ND."""

MOST_TIMES_THE_SIZE = 10.0
"""Between models of equal compute: a much larger one has hardly begun its training with it."""

MOST_APART = 3
"""Models that are named where none is comparable."""

_SCORE_COLUMNS = ["model", "task", "metric", "shots", "definition", "value", "stderr", "source"]
_SERIES_COLUMNS = ["model", "task", "metric", "steps", "values"]


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """A model that scores were published of."""

    name: str
    parameters: int
    """All, with the embeddings."""
    tokens: int | None
    """Trained on, repetitions counted; None where it was not published."""
    source: str
    """Of these two numbers."""


@dataclass(frozen=True, slots=True)
class PublishedScore:
    """One published number."""

    model: PublishedModel
    task: str
    metric: str
    shots: int | None
    """None: not published."""
    definition: str
    value: float
    stderr: float | None
    source: str
    tokens: int | None
    """That the scored weights had seen."""
    step: int | None = None
    """Optimizer steps of a checkpoint from the middle of training; None for the finished model."""

    @property
    def flops(self) -> float | None:
        """Training compute of the scored weights, 6ND."""
        return None if self.tokens is None else training_flops(self.model.parameters, self.tokens)

    @property
    def label(self) -> str:
        """The model, and which of its checkpoints."""
        return self.model.name if self.step is None else f"{self.model.name} at step {self.step:,}"


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A published model's score over its training."""

    model: PublishedModel
    task: str
    metric: str
    shots: int
    steps: tuple[int, ...]
    values: tuple[float, ...]
    tokens_per_step: int
    source: str

    def tokens(self) -> tuple[int, ...]:
        """Seen at each step."""
        return tuple(step * self.tokens_per_step for step in self.steps)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What is published that one score of ours may be compared with."""

    comparable: tuple[PublishedScore, ...]
    """Of finished models of any size, by size."""
    equal_parameters: tuple[PublishedScore, ...]
    """Within `PARAMETERS_FACTOR`, nearest first."""
    equal_compute: tuple[PublishedScore, ...]
    """Within `COMPUTE_FACTOR` of 6ND, the nearest in size first; of each model one checkpoint, also from the middle of
    its training."""
    nearest: PublishedScore | None
    """The model of the nearest size."""
    apart: tuple[tuple[PublishedScore, str], ...]
    """Of about equal size and the same task, but not comparable; with the reason."""
    nearest_apart: tuple[tuple[PublishedScore, str], ...]
    """Where nothing is comparable, the `MOST_APART` nearest in size that are not, a row a model, with the reason."""
    not_comparable: Mapping[str, int]
    """Reason -> number of all published scores of this task that are left out for it."""

    def apart_for(self, reason: str) -> list[PublishedScore]:
        """Those of `apart` that are left out for a reason."""
        return [score for score, why in self.apart if why == reason]


@dataclass(frozen=True)
class Baselines:
    """Everything published that this version knows of."""

    definitions: Mapping[str, str]
    sources: Mapping[str, str]
    scores: tuple[PublishedScore, ...]
    trajectories: tuple[Trajectory, ...]

    def neighbours(
        self, task: str, metric: str, shots: int | None, *, parameters: int | None, tokens: int | None
    ) -> Neighbours:
        """What a score may be compared with.

        Args:
            task: as lm-eval names it.
            metric: as in the task's result file.
            shots: that the prompts really had; None where they differ, and nothing is comparable then.
            parameters: of our model, all of them; None where not known.
            tokens: that it was trained on; None where not known.
        """
        about = [score for score in self.scores if score.task == task]
        reasons = [(score, _why_not(score, metric, shots)) for score in about]
        comparable = sorted(
            (score for score, reason in reasons if reason is None), key=lambda score: score.model.parameters
        )
        refused = [(score, reason) for score, reason in reasons if reason is not None]
        by_size = _nearest(comparable, parameters, lambda score: score.model.parameters)
        flops = None if parameters is None or tokens is None else training_flops(parameters, tokens)
        grown = [*comparable, *self._middle(task, metric, shots)]
        return Neighbours(
            comparable=tuple(comparable),
            equal_parameters=tuple(score for score, away in by_size if away <= PARAMETERS_FACTOR),
            equal_compute=_equal_compute(grown, parameters, flops),
            nearest=by_size[0][0] if by_size else None,
            apart=tuple(
                (score, reason)
                for score, reason in refused
                if parameters is not None and _away(score.model.parameters, parameters) <= PARAMETERS_FACTOR
            ),
            nearest_apart=() if comparable else _nearest_apart(refused, parameters, metric, shots),
            not_comparable=dict(Counter(reason for _, reason in refused)),
        )

    def trajectory(self, task: str, metric: str, shots: int | None, parameters: int | None) -> Trajectory | None:
        """The score over training of the model whose size is nearest; None where none is of the same definition."""
        found = [t for t in self.trajectories if (t.task, t.metric, t.shots) == (task, metric, shots)]
        if not found or not parameters:
            return None
        return min(found, key=lambda t: _away(t.model.parameters, parameters))

    def _middle(self, task: str, metric: str, shots: int | None) -> list[PublishedScore]:
        """Checkpoints from the middle of training, without the untrained one and the last."""
        return [
            PublishedScore(t.model, task, metric, shots, OURS, value, None, t.source, step * t.tokens_per_step, step)
            for t in self.trajectories
            if (t.task, t.metric, t.shots) == (task, metric, shots)
            for step, value in zip(t.steps[:-1], t.values[:-1], strict=True)
            if step > 0
        ]


def training_flops(parameters: float, tokens: float) -> float:
    """6ND: forward and backward of N parameters on D tokens, without attention's share.

    Source: Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1; with N all parameters, because
    that is what is published of every model here.
    """
    return 6.0 * parameters * tokens


@functools.cache
def load_baselines(path: Path = BASELINES_FILE) -> Baselines:
    """Read and check the file.

    Raises:
        EvalError: it is not of this format, or a row names a model, definition or source that it does not have.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        models = {name: _model(name, row) for name, row in content["models"].items()}
        scores = tuple(_score(row, models, content) for row in _rows(content, "score_columns", "scores"))
        trajectories = tuple(_trajectories(content["trajectories"], models, content["sources"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvalError(f"{path}: not a file of published scores of format {FORMAT}: {error!r}") from None
    twice = Counter((s.model.name, s.task, s.metric, s.shots, s.definition) for s in scores)
    repeated = [key for key, times in twice.items() if times > 1]
    if repeated:
        raise EvalError(f"{path}: {repeated[0]} is there {twice[repeated[0]]} times; one score each")
    return Baselines(content["definitions"], content["sources"], scores, trajectories)


def _rows(content: Mapping[str, Any], columns: str, rows: str) -> list[dict[str, Any]]:
    expected = _SCORE_COLUMNS if rows == "scores" else _SERIES_COLUMNS
    if content[columns] != expected:
        raise ValueError(f"{columns} are {content[columns]}, expected {expected}")
    return [dict(zip(expected, row, strict=True)) for row in content[rows]]


def _model(name: str, row: Mapping[str, Any]) -> PublishedModel:
    parameters, tokens = row["parameters"], row["tokens"]
    if not isinstance(parameters, int) or parameters < 1 or not (tokens is None or isinstance(tokens, int)):
        raise ValueError(f"{name}: parameters {parameters!r} and tokens {tokens!r} must be whole numbers")
    return PublishedModel(name, parameters, tokens, row["source"])


def _score(row: Mapping[str, Any], models: Mapping[str, PublishedModel], content: Mapping[str, Any]) -> PublishedScore:
    model = models[row["model"]]
    for key, known in (("definition", content["definitions"]), ("source", content["sources"])):
        if row[key] not in known:
            raise ValueError(f"{row}: unknown {key} {row[key]!r}")
    value = float(row["value"])
    if not (value >= 0 if row["metric"] == "perplexity" else 0 <= value <= 1):
        raise ValueError(f"{row}: value {value} is no share of right answers")
    return PublishedScore(**{**row, "model": model, "value": value, "tokens": model.tokens})


def _trajectories(
    content: Mapping[str, Any], models: Mapping[str, PublishedModel], sources: Mapping[str, str]
) -> Iterable[Trajectory]:
    if content["source"] not in sources:
        raise ValueError(f"trajectories: unknown source {content['source']!r}")
    if content["definition"] != OURS:
        raise ValueError(f"trajectories are of the definition {content['definition']!r}, expected {OURS!r}")
    for row in _rows(content, "series_columns", "series"):
        steps, values = tuple(row["steps"]), tuple(row["values"])
        if len(steps) != len(values) or list(steps) != sorted(set(steps)):
            raise ValueError(f"{row['model']} {row['task']}: {len(steps)} steps and {len(values)} values, or no order")
        yield Trajectory(
            models[row["model"]],
            row["task"],
            row["metric"],
            content["shots"],
            steps,
            values,
            content["tokens_per_step"],
            content["source"],
        )


def _why_not(score: PublishedScore, metric: str, shots: int | None) -> str | None:
    """Why a published score of the same task is not comparable with ours; None where it is."""
    if score.definition != OURS:
        return f"defined otherwise: {score.definition}"
    if score.metric != metric:
        return f"{score.metric} is not {metric}"
    if shots is None or score.shots != shots:
        ours = "several numbers of shots" if shots is None else f"{shots} shots"
        return f"{'an unknown number of' if score.shots is None else score.shots} shots, ours has {ours}"
    return None


def _away(a: float, b: float) -> float:
    """How many times the smaller the larger is."""
    return max(a / b, b / a) if a > 0 and b > 0 else math.inf


def _nearest(scores: Iterable[PublishedScore], wanted: float | None, size: Any) -> list[tuple[PublishedScore, float]]:
    """Scores with how far away they are, nearest first."""
    if not wanted:
        return []
    known = [(score, _away(size(score), wanted)) for score in scores if size(score)]
    return sorted(known, key=lambda pair: (pair[1], pair[0].label))


def _nearest_apart(
    refused: Iterable[tuple[PublishedScore, str]], parameters: int | None, metric: str, shots: int | None
) -> tuple[tuple[PublishedScore, str], ...]:
    """The nearest in size, of each model what has most in common with ours; by name where our size is not known."""
    found: dict[str, tuple[PublishedScore, str]] = {}
    alike = sorted(refused, key=lambda one: (one[0].shots != shots, one[0].metric != metric))
    for score, reason in alike:
        found.setdefault(score.model.name, (score, reason))
    away = {name: _away(one.model.parameters, parameters or 0) for name, (one, _) in found.items()}
    names = sorted(found, key=lambda name: (away[name], name))
    return tuple(found[name] for name in names[:MOST_APART])


def _equal_compute(
    scores: Iterable[PublishedScore], parameters: int | None, flops: float | None
) -> tuple[PublishedScore, ...]:
    """Of each model the checkpoint of the nearest compute, by size."""
    found: dict[str, PublishedScore] = {}
    for score, away in _nearest(scores, flops, lambda score: score.flops):
        if away <= COMPUTE_FACTOR:
            found.setdefault(score.model.name, score)
    by_size = _nearest(found.values(), parameters, lambda score: score.model.parameters)
    return tuple(score for score, away in by_size if away <= MOST_TIMES_THE_SIZE)
