"""Answers that a judge gave points: MT-Bench by turn and category, two checkpoints compared, scores from 0 to 100."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evals import report_charts as charts
from evals.caveats import judged_caveats
from evals.results import Metric, TaskResult
from evals.sample_files import Row

EACH = 2
"""Best and worst answers that are shown."""
MOST_WRONG_FORM = 2
"""Judgements without points that are shown."""
_LONGEST = 1200
"""Characters of an answer or a judgement that are shown."""
_TITLES = {
    "mt_bench": "MT-Bench",
    "mt_bench_against": "MT-Bench, two checkpoints side by side",
}
_NAMES = {
    "average": "average of both turns",
    "turn_1": "first turn",
    "turn_2": "second turn",
    "average_without_wrong_references": "average without the questions whose reference is wrong",
    "score": "mean of all answers",
    "points": "points (a tie is half a win)",
    "consistent": "same verdict in both places",
}


_OF_THE_JUDGE = {
    "server": "server",
    "weights": "weights",
    "dtype": "precision",
    "arithmetic": "arithmetic",
    "template": "chat format",
    "max_tokens": "tokens a judgement, at most",
    "sha256": "file (sha256)",
}
"""What `evals.judge.ask.Judge.settings` may hold -> its name in the report."""


@dataclass(frozen=True, slots=True)
class Scale:
    """The points that a judge may give."""

    low: float
    high: float
    edges: tuple[float, float]
    bins: int
    """Of the histogram, between the edges; 0 for none."""
    digits: int
    """Behind the decimal point, in tables."""


RATINGS = Scale(1, 10, edges=(0.5, 10.5), bins=10, digits=2)
SCORES = Scale(0, 100, edges=(0, 100), bins=10, digits=1)
SHARES = Scale(0, 1, edges=(0, 1), bins=0, digits=4)


@dataclass(frozen=True, slots=True)
class Category:
    """Questions of one kind."""

    name: str
    n: int
    metrics: dict[str, Metric]
    """average, turn_1, turn_2: those that have a rating at all."""


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """One answer, what it was asked, and what the judge said."""

    document: str
    name: str
    points: float | None
    """None where the judge's words hold none."""
    question: str
    answer: str
    right: str | None
    """What would have been right; None where the set does not say."""
    judgement: str


@dataclass(frozen=True, slots=True)
class Judged:
    """One result of one checkpoint."""

    step: int
    task: str
    title: str
    scale: Scale
    judge: str
    how: str
    """Whether the judge was asked, or what it said before was read."""
    against: str
    """The other checkpoint; empty where there is none."""
    n: int
    n_total: int
    n_judgements: int
    """Turns or documents that were judged; 0 where the single judgements were not kept."""
    n_failed: int
    """Of them without points; left out of every mean."""
    metrics: dict[str, Metric]
    categories: tuple[Category, ...]
    points: tuple[float, ...]
    wrong_references: tuple[int, ...]
    """Questions whose published reference answer is known to be wrong."""
    notes: str
    settings: tuple[tuple[str, str], ...]
    truncated: int
    """Of `documents`: those with a prompt, of one turn at least, that lost its beginning."""
    seconds: float
    told: tuple[str, ...] = ()
    """Where the measurement is not the published one."""
    best: tuple[JudgedAnswer, ...] = field(default=())
    worst: tuple[JudgedAnswer, ...] = field(default=())
    failed: tuple[JudgedAnswer, ...] = field(default=())

    @property
    def documents(self) -> str:
        """What `n` counts."""
        return "questions" if self.task.startswith("mt_bench") else "answers"

    @property
    def cut_things(self) -> str:
        """What `truncated` counts."""
        is_bench = self.task.startswith("mt_bench")
        return (
            "Questions with a turn whose prompt lost its beginning" if is_bench else "Prompts that lost their beginning"
        )

    @property
    def judged_things(self) -> str:
        """What `n_judgements` counts."""
        return "turns, each judged in both places" if self.against else "judgements"

    @property
    def rows(self) -> list[tuple[str, Metric]]:
        """(name, metric), as a reader understands them."""
        return [(_NAMES.get(name, name), metric) for name, metric in self.metrics.items()]


def judged(step: int, result: TaskResult, rows: Sequence[Row]) -> Judged:
    """What a reader of judged answers must know.

    Args:
        step: of the checkpoint.
        result: of `megagpt eval mt-bench` or `megagpt eval answers`.
        rows: its samples file; none where it is not there.
    """
    settings = result.settings
    scale = RATINGS if result.task == "mt_bench" else SHARES if result.task == "mt_bench_against" else SCORES
    answers = [_answer(row) for row in rows if "response" in row]
    known = sorted((one for one in answers if one.points is not None), key=lambda one: one.points or 0.0)
    first_of: dict[str, JudgedAnswer] = {}  # one turn of a question: its worst, and among the best its best
    last_of: dict[str, JudgedAnswer] = {}
    for one in known:
        first_of.setdefault(one.document, one)
        last_of[one.document] = one
    worst = list(first_of.values())[: min(EACH, (len(first_of) + 1) // 2)]
    named = {one.document for one in worst}
    best = [one for one in sorted(last_of.values(), key=lambda one: -(one.points or 0)) if one.document not in named]
    return Judged(
        step=step,
        task=result.task,
        title=_TITLES.get(result.task, f"Answers to {result.task.removeprefix('answers_')}"),
        scale=scale,
        judge=str(settings["judge"]),
        how=_how(str(settings["judge"])),
        against=_against(settings.get("against")),
        n=result.n,
        n_total=result.n_total,
        n_judgements=len(rows),
        n_failed=sum(not row.get("metrics") for row in rows),
        metrics=result.metrics,
        categories=tuple(_category(name, found) for name, found in result.subtasks.items()),
        points=tuple(one.points for one in known if one.points is not None),
        wrong_references=tuple(settings.get("known_wrong_references", ())),
        notes=_notes(result.reason),
        settings=tuple(_shown_settings(settings)),
        truncated=result.truncated,
        seconds=result.seconds,
        told=judged_caveats(result),
        best=tuple(best[:EACH]),
        worst=tuple(worst),
        failed=tuple(one for one in answers if one.points is None)[:MOST_WRONG_FORM],
    )


def judged_charts(found: Judged) -> list[str]:
    """Categories with their intervals, and how the points are spread."""
    drawn = []
    limits = (found.scale.low, found.scale.high)
    bars = [
        charts.Bar(category.name, metric.value, metric.ci95, None)
        for category in found.categories
        if (metric := category.metrics.get("average")) is not None
    ]
    if bars:
        title = f"{found.title} by category"
        drawn.append(charts.score_chart(title, bars, limits=limits, x_label="rating with 95 % interval", width=4.4))
    if found.points and found.scale.bins:
        title = f"{found.title}, all points given"
        drawn.append(charts.histogram(title, found.points, found.scale.edges, found.scale.bins))
    return drawn


def _answer(row: Row) -> JudgedAnswer:
    turn = f", turn {row['turn']}" if "turn" in row else ""
    category = f" ({row['category']})" if "category" in row else ""
    flag = "; its reference is known to be wrong" if row.get("reference_known_wrong") else ""
    target = row.get("target")
    return JudgedAnswer(
        document=str(row.get("doc_id")),
        name=f"{'document' if 'turn' not in row else 'question'} {row.get('doc_id')}{turn}{category}{flag}",
        points=next(iter((row.get("metrics") or {}).values()), None),
        question=_cut(str(row.get("prompt_end", ""))),
        answer=_cut(str(row["response"])),
        right=None if target is None else _cut(str(target)),
        judgement=_cut(str(row.get("judgement", ""))),
    )


def _category(name: str, found: Mapping[str, Any]) -> Category:
    metrics = {
        key: value if isinstance(value, Metric) else Metric(**{**value, "ci95": _bounds(value.get("ci95"))})
        for key, value in found.get("metrics", {}).items()
    }
    return Category(name, int(found["n"]), metrics)


def _bounds(interval: Sequence[float] | None) -> tuple[float, float] | None:
    return None if interval is None else (float(interval[0]), float(interval[1]))


def _notes(reason: str) -> str:
    """What the result says beside the numbers that stand by themselves: failures and wrong references."""
    told = ("judgements have no", "their turns are left out", "are known to be wrong")
    notes = "; ".join(part for part in reason.split("; ") if not any(words in part for words in told))
    return notes[:1].upper() + notes[1:]


def _how(judge: str) -> str:
    if judge.startswith("replayed: "):
        return "nobody was asked: judgements that were made before were read from a file"
    if judge.startswith("checkpoint "):
        return "a checkpoint of megagpt, greedily"
    return "a model behind an OpenAI-compatible server, at temperature 0"


def _against(other: Any) -> str:
    if not isinstance(other, Mapping):
        return ""
    return f"{other.get('run')} at step {other.get('step')}, weights {str(other.get('hash', ''))[:12]}"


def _shown_settings(settings: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """What decides the answers and the points, beside the judge."""
    for key, name in (
        ("judge_prompts", "the judge's prompts"),
        ("judge_prompt", "the judge's prompt"),
        ("template", "chat format"),
        ("max_new_tokens", "tokens an answer, at most"),
        ("seed", "seed of the answers"),
        ("dtype", "precision"),
        ("limit", "first ones only"),
    ):
        if settings.get(key) is not None:
            yield name, str(settings[key])
    judge = settings.get("judge_settings") or {}
    for key, name in _OF_THE_JUDGE.items():
        if judge.get(key) is not None:
            yield f"the judge's {name}", str(judge[key])


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} [{len(text) - _LONGEST:,} more characters]"
