"""MT-Bench's questions as texts that must not stand in training data (see `evals.items`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evals.mt_bench.data import Question, load_benchmark
from evals.task_loader import DataOrigin, TaskUnavailableError
from megagpt.errors import EvalError

MT_BENCH = "mt_bench"


def question_items(data_dir: Path | None) -> tuple[list[dict[str, Any]], DataOrigin]:
    """All 80 questions by their official numbers, which are the documents' numbers in the samples files.

    Args:
        data_dir: the user's folder with MT-Bench's files, or the one above it.

    Raises:
        TaskUnavailableError: no folder is named, or its files are absent or damaged.
    """
    if data_dir is None:
        raise TaskUnavailableError("its questions are read from local files alone; name their folder (--data)")
    try:
        benchmark = load_benchmark(data_dir)
    except EvalError as error:
        raise TaskUnavailableError(str(error)) from None
    rows = [
        {"task": MT_BENCH, "id": question.question_id, "texts": question_texts(question)}
        for question in benchmark.questions
    ]
    return rows, DataOrigin("local", str(benchmark.folder), benchmark.digest())


def question_texts(question: Question) -> list[str]:
    """Each turn with its reference answer, where one is published, and each turn by itself."""
    turns = [turn.strip() for turn in question.turns]
    answered: list[str] = []
    if question.references is not None:
        answered = [f"{turn} {right}".strip() for turn, right in zip(turns, question.references, strict=True)]
    return [text for text in dict.fromkeys([*answered, *turns]) if text]
