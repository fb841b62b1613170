"""Answers a reader should see: the surest right ones and the surest wrong ones of each task, or the best and worst."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evals.sample_files import PROMPT_END_CHARACTERS, Row

EACH = 2
"""Right and wrong ones of a task."""
_LONGEST = 1200
"""Characters of an answer that are shown."""
_DECIDES = ("acc", "exact_match")
"""Metrics that say how good one answer is; the first that a row has."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One possible answer."""

    text: str
    logprob: float
    """Sum over its tokens, nats."""
    is_chosen: bool
    is_right: bool | None
    """None where that was not kept."""


@dataclass(frozen=True, slots=True)
class Example:
    """One document and what the model made of it."""

    step: int
    task: str
    document: str
    is_right: bool | None
    """None where an answer is neither right nor wrong but has a `score`."""
    margin: float | None
    """Log-probability of the right choice above the best other one, nats; None of generated answers and of scores."""
    score: float | None
    """0 to 1: of truthfulqa_mc2 the share of the choices' probability that the right ones have together."""
    prompt_end: str
    choices: tuple[Choice, ...]
    answer: str | None
    """What was generated; None where the model chose."""
    target: str
    """What would have been right."""


def examples(step: int, task: str, rows: Sequence[Row]) -> list[Example]:
    """The best and the worst answers: by margin where the model chose, the first ones where it wrote.

    Of a task whose metric is not 0 or 1 for every document, right and wrong mean nothing: the best and the worst score.
    """
    graded = any(_is_graded(row) for row in rows)
    found = [example for row in rows if (example := _example(step, task, row, graded=graded)) is not None]
    first: dict[str, Example] = {}
    for example in found:  # a document answered under two filters is one document
        first.setdefault(example.document, example)
    if graded:
        by_score = sorted(first.values(), key=lambda e: -(e.score or 0.0))
        n = min(EACH, len(by_score) // 2)
        return [*by_score[: max(n, 1)], *reversed(by_score[len(by_score) - n :])] if by_score else []
    right = sorted((e for e in first.values() if e.is_right), key=lambda e: -(e.margin or 0.0))
    wrong = sorted((e for e in first.values() if not e.is_right), key=lambda e: e.margin or 0.0)
    return [*right[:EACH], *wrong[:EACH]]


def _is_graded(row: Row) -> bool:
    """Whether its score is no 0 or 1; files of older versions call such an answer correct whatever it scored."""
    return "right" in row or _value(row) not in (None, 0, 1)


def _value(row: Row) -> float | None:
    metrics = row.get("metrics") or {}
    return next((metrics[name] for name in _DECIDES if name in metrics), None)


def _example(step: int, task: str, row: Row, *, graded: bool) -> Example | None:
    correct, value = row.get("correct"), _value(row)
    if "prompt_end" not in row or (value is None if graded else correct is None):
        return None
    leaf, document = row.get("task", task), row.get("doc_id")
    name = str(document) if leaf == task else f"{leaf} {document}"
    is_right, score = (None, value) if graded else (bool(correct), None)
    choices, logprobs = row.get("choices"), row.get("logprobs")
    if not choices or not logprobs:
        answer = row.get("raw_response", row.get("response"))
        target = _cut(str(row.get("target", "")))
        return Example(step, task, name, is_right, None, score, _prompt(row), (), _cut(str(answer)), target)
    gold = _right_choices(row, choices, graded=graded)
    options = tuple(
        Choice(str(text), float(logprob), i == row.get("response"), None if gold is None else i in gold)
        for i, (text, logprob) in enumerate(zip(choices, logprobs, strict=False))
    )
    margin = None if graded else _margin(options)
    return Example(step, task, name, is_right, margin, score, _prompt(row), options, None, "")


def _margin(options: Sequence[Choice]) -> float | None:
    right = [option.logprob for option in options if option.is_right]
    others = [option.logprob for option in options if option.is_right is False]
    return right[0] - max(others) if len(right) == 1 and others and math.isfinite(right[0]) else None


def _prompt(row: Row) -> str:
    """What is kept of the prompt; where that is its end alone, from the next word on."""
    text = str(row["prompt_end"])
    if len(text) < PROMPT_END_CHARACTERS:
        return text
    _, _, rest = text.partition(" ")
    return f"[...] {rest or text}"


def _right_choices(row: Row, choices: Sequence[Any], *, graded: bool) -> tuple[int, ...] | None:
    """Numbers of the right choices; None where they cannot be told.

    The target of a graded answer does not say them: truthfulqa_mc2's is 0 for every document.
    """
    if "right" in row:
        return tuple(row["right"])
    target = row.get("target")
    if graded or isinstance(target, bool):
        return None
    if isinstance(target, list):
        return tuple(target) if all(isinstance(one, int) for one in target) else None
    if isinstance(target, int):
        return (target,)
    text = str(target)
    if text.isdigit():
        return (int(text),)
    found = next((i for i, choice in enumerate(choices) if str(choice).strip() == text.strip()), None)
    return None if found is None else (found,)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} [{len(text) - _LONGEST:,} more characters]"
