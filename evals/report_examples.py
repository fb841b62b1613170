"""Answers a reader should see: the surest right ones and the surest wrong ones of each task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evals.sample_files import PROMPT_END_CHARACTERS, Row

EACH = 2
"""Right and wrong ones of a task."""
_LONGEST = 1200
"""Characters of an answer that are shown."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One possible answer."""

    text: str
    logprob: float
    """Sum over its tokens, nats."""
    is_chosen: bool
    is_right: bool


@dataclass(frozen=True, slots=True)
class Example:
    """One document and what the model made of it."""

    step: int
    task: str
    document: str
    is_right: bool
    margin: float | None
    """Log-probability of the right choice above the best other one, nats; None of generated answers."""
    prompt_end: str
    choices: tuple[Choice, ...]
    answer: str | None
    """What was generated; None where the model chose."""
    target: str
    """What would have been right."""


def examples(step: int, task: str, rows: Sequence[Row]) -> list[Example]:
    """The best and the worst answers: by margin where the model chose, the first ones where it wrote."""
    found = [example for row in rows if (example := _example(step, task, row)) is not None]
    first: dict[str, Example] = {}
    for example in found:  # a document answered under two filters is one document
        first.setdefault(example.document, example)
    chosen = sorted(first.values(), key=lambda e: -(e.margin or 0.0))
    return [*[e for e in chosen if e.is_right][:EACH], *[e for e in reversed(chosen) if not e.is_right][:EACH]]


def _example(step: int, task: str, row: Row) -> Example | None:
    correct = row.get("correct")
    if correct is None or "prompt_end" not in row:
        return None
    leaf, document = row.get("task", task), row.get("doc_id")
    name = str(document) if leaf == task else f"{leaf} {document}"
    choices, logprobs = row.get("choices"), row.get("logprobs")
    if not choices or not logprobs:
        answer = row.get("raw_response", row.get("response"))
        target = _cut(str(row.get("target", "")))
        return Example(step, task, name, bool(correct), None, _prompt(row), (), _cut(str(answer)), target)
    gold = _gold(row.get("target"), choices)
    options = tuple(
        Choice(str(text), float(logprob), i == row.get("response"), i == gold)
        for i, (text, logprob) in enumerate(zip(choices, logprobs, strict=False))
    )
    others = [option.logprob for option in options if not option.is_right]
    margin = options[gold].logprob - max(others) if gold is not None and gold < len(options) and others else None
    return Example(step, task, name, bool(correct), margin, _prompt(row), options, None, "")


def _prompt(row: Row) -> str:
    """What is kept of the prompt; where that is its end alone, from the next word on."""
    text = str(row["prompt_end"])
    if len(text) < PROMPT_END_CHARACTERS:
        return text
    _, _, rest = text.partition(" ")
    return f"[...] {rest or text}"


def _gold(target: Any, choices: Sequence[Any]) -> int | None:
    """The right choice's number; None where several are right, or it cannot be told."""
    if isinstance(target, bool | list):
        return None
    if isinstance(target, int):
        return target
    text = str(target)
    if text.isdigit():
        return int(text)
    return next((i for i, choice in enumerate(choices) if str(choice).strip() == text.strip()), None)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} [{len(text) - _LONGEST:,} more characters]"
