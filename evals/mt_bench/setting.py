"""What rating answers and comparing two checkpoints have in common: the request, the answers, the result's head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.judge.ask import Judge
from evals.judge.choose import JudgeOptions
from evals.judged_model import JudgedModel, ModelRequest
from evals.mt_bench.answers import Answer, Answered, AnswerSettings, answer_all, room_for_answers
from evals.mt_bench.data import TEMPERATURES, WRONG_REFERENCES, Benchmark, Question
from evals.results import TaskResult

TASK = "mt_bench"


@dataclass(frozen=True)
class MTBenchRequest:
    """What to ask, whom, and who judges."""

    model: ModelRequest
    data_dir: Path
    judge: JudgeOptions
    limit: int | None = None
    """Only the first questions of each category; None for all ten."""
    seed: int = 0
    """Of the answers that are drawn."""


def stored_answers(
    model: JudgedModel, questions: Sequence[Question], seed: int, on_progress: Callable[[int, int], None]
) -> Answered:
    """The checkpoint's answers; those that are not in mt_bench.answers.jsonl are made."""
    return answer_all(
        lambda: model.lm,
        questions,
        answer_settings(model, seed),
        model.out / f"{TASK}.answers.jsonl",
        model.model_id,
        on_progress,
    )


def answer_settings(model: JudgedModel, seed: int = 0) -> AnswerSettings:
    """What decides the checkpoint's answers."""
    return AnswerSettings(
        model.checkpoint.hash,
        model.request.dtype,
        model.template,
        room_for_answers(model.max_seq_len),
        tokenizer=model.tokenizer.fingerprint,
        code=model.code,
        seed=seed,
    )


def first_of_each(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """All, or the first ones of each category."""
    taken = dict.fromkeys(TEMPERATURES, 0)
    chosen = []
    for question in questions:
        if limit is None or taken[question.category] < limit:
            chosen.append(question)
            taken[question.category] += 1
    return chosen


def question_fields(question: Question) -> dict[str, str]:
    """What every template may show of a question."""
    fields = {"question": question.turns[0], "question_1": question.turns[0], "question_2": question.turns[1]}
    if question.references is not None:
        fields |= {"ref_answer_1": question.references[0], "ref_answer_2": question.references[1]}
    return fields


def shared_settings(
    request: MTBenchRequest, benchmark: Benchmark, questions: Sequence[Question], judge: Judge
) -> dict[str, Any]:
    """Settings of every result."""
    return {
        "limit": request.limit,
        "judge": judge.name,
        "judge_settings": dict(judge.settings),
        "judge_prompts": benchmark.prompts_origin,
        "seed": request.seed,
        "known_wrong_references": list(wrong_references(benchmark, questions)),
    }


def make_result(
    model: JudgedModel,
    *,
    task: str,
    settings: Mapping[str, Any],
    benchmark: Benchmark,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    told: Sequence[str],
    **scores: Any,
) -> TaskResult:
    """The result of `model`, whose answers these are.

    Args:
        model: whose result it is.
        task: its name.
        settings: all that decided it, beside the model's own.
        benchmark: the files.
        questions: those that were asked.
        answers: the model's.
        told: what a reader must know of the judgements.
        scores: metrics, seconds, subtasks of `TaskResult`.
    """
    data = {"path_or_id": str(benchmark.folder), "sha256": benchmark.digest()}
    return TaskResult(
        **model.header(task, dict(settings), data),
        status="ok",
        reason="; ".join([*told, *explain_references(benchmark, questions)]),
        task_version="1",
        n_shots=0,
        n=len(questions),
        n_total=len(benchmark.questions),
        truncated=sum(answer.truncated for answer in answers),
        **scores,
    )


def explain_references(benchmark: Benchmark, questions: Sequence[Question]) -> list[str]:
    """What a reader must know of the reference answers and of the judge's prompts."""
    told = []
    if wrong := wrong_references(benchmark, questions):
        ids = ", ".join(map(str, wrong))
        told.append(f"the published reference answers to {len(wrong)} questions are known to be wrong ({ids})")
    elif not benchmark.has_published_references:
        told.append("the reference answers are not the published ones; whether they are right is not known")
    if benchmark.prompts_origin != "official":
        told.append("judged with megagpt's own prompts: not comparable with published scores")
    return told


def wrong_references(benchmark: Benchmark, questions: Sequence[Question]) -> tuple[int, ...]:
    """Those of the questions whose published reference answer is known to be wrong."""
    asked = {question.question_id for question in questions}
    return tuple(number for number in WRONG_REFERENCES if number in asked) if benchmark.has_published_references else ()
