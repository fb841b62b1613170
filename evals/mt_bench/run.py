"""`megagpt eval mt-bench`: answers, judgements, one result."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.judge.ask import FAILED, Judgement, JudgementFile, JudgeRequest
from evals.judge.choose import JudgeOptions, open_judge
from evals.judged_model import JudgedModel, ModelRequest
from evals.mt_bench.answers import Answer, AnswerSettings, answer_all, room_for_answers
from evals.mt_bench.data import TEMPERATURES, WRONG_REFERENCES, Benchmark, Question, load_benchmark
from evals.mt_bench.rating import parse_rating
from evals.mt_bench.scores import MTBenchScores, score
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


def run_mt_bench(request: MTBenchRequest, on_progress: Callable[[str, int, int], None]) -> TaskResult:
    """Answer, judge and score; what an earlier call of the same has stored is not done again.

    Files: <run>/evals/step_<step>/mt_bench.json, mt_bench.answers.jsonl, mt_bench.judgements.jsonl.

    Args:
        request: what, whom, by whom.
        on_progress: told what is done (`answers`, `judgements`), how much of it, and of how much.

    Raises:
        EvalError: damaged data, or a judge that fails; what is stored stands.
        CheckpointError: no checkpoint that can be used.
    """
    started = time.monotonic()
    benchmark = load_benchmark(request.data_dir)
    questions = first_of_each(benchmark.questions, request.limit)
    model = JudgedModel(request.model)
    judge = open_judge(request.judge, parse_rating)
    answers = stored_answers(model, questions, request.seed, lambda *at: on_progress("answers", *at))
    requests = judge_requests(benchmark, questions, answers)
    judged = JudgementFile(model.out / f"{TASK}.judgements.jsonl", model.model_id, judge, parse_rating)
    judgements = judged.judge_all(requests, lambda *at: on_progress("judgements", *at))
    scores = score(questions, judgements, has_published_references=benchmark.has_published_references)
    shown_settings = {
        "limit": request.limit,
        "judge": judge.name,
        "judge_prompts": benchmark.prompts_origin,
        "judge_temperature": 0,
        "temperatures": TEMPERATURES,
        "max_new_tokens": room_for_answers(model.max_seq_len),
        "seed": request.seed,
        "template_text": model.template.prompt([("...", None)]),
        "known_wrong_references": list(_wrong(benchmark, questions)),
    }
    data = {"path_or_id": str(benchmark.folder), "sha256": benchmark.digest()}
    result = TaskResult(
        **model.header(TASK, shown_settings, data),
        status="ok",
        reason=explain(benchmark, questions, scores),
        task_version="1",
        n_shots=0,
        n=len(questions),
        n_total=len(benchmark.questions),
        metrics=scores.metrics,
        truncated=sum(answer.truncated for answer in answers),
        seconds=time.monotonic() - started,
        subtasks=scores.categories,
    )
    return result.write(model.out, sample_lines(benchmark, questions, answers, judgements))


def stored_answers(
    model: JudgedModel, questions: Sequence[Question], seed: int, on_progress: Callable[[int, int], None]
) -> list[Answer]:
    """The checkpoint's answers; those that are not in mt_bench.answers.jsonl are made."""
    return answer_all(
        lambda: model.lm,
        questions,
        AnswerSettings(
            model.checkpoint.hash, model.request.dtype, model.template, room_for_answers(model.max_seq_len), seed
        ),
        model.out / f"{TASK}.answers.jsonl",
        model.model_id,
        on_progress,
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


def judge_requests(
    benchmark: Benchmark, questions: Sequence[Question], answers: Sequence[Answer]
) -> list[JudgeRequest]:
    """Two a question: the first answer by itself, the second with the whole conversation before it.

    Source: FastChat, llm_judge/common.py (run_judge_single) and gen_judgment.py.
    """
    requests = []
    for question, answer in zip(questions, answers, strict=True):
        math = "" if question.references is None else "-math"
        fields = {
            "question": question.turns[0],
            "answer": answer.turns[0],
            "question_1": question.turns[0],
            "question_2": question.turns[1],
            "answer_1": answer.turns[0],
            "answer_2": answer.turns[1],
        }
        if question.references is not None:
            fields |= {"ref_answer_1": question.references[0], "ref_answer_2": question.references[1]}
        for turn, name in ((1, f"single{math}-v1"), (2, f"single{math}-v1-multi-turn")):
            prompt = benchmark.prompts[name]
            requests.append(JudgeRequest(question.question_id, turn, name, prompt.system, prompt.fill(fields)))
    return requests


def explain(benchmark: Benchmark, questions: Sequence[Question], scores: MTBenchScores) -> str:
    """What a reader of the score must know."""
    told = []
    if scores.failures:
        told.append(f"{scores.failures} of {scores.n_judged} judgements have no rating and are left out")
    return "; ".join([*told, *explain_references(benchmark, questions)])


def explain_references(benchmark: Benchmark, questions: Sequence[Question]) -> list[str]:
    """What a reader must know of the reference answers and of the judge's prompts."""
    told = []
    if wrong := _wrong(benchmark, questions):
        ids = ", ".join(map(str, wrong))
        told.append(f"the published reference answers to {len(wrong)} questions are known to be wrong ({ids})")
    elif not benchmark.has_published_references:
        told.append("the reference answers are not the published ones; whether they are right is not known")
    if benchmark.prompts_origin != "official":
        told.append("judged with megagpt's own prompts: not comparable with published scores")
    return told


def _wrong(benchmark: Benchmark, questions: Sequence[Question]) -> tuple[int, ...]:
    asked = {question.question_id for question in questions}
    return tuple(number for number in WRONG_REFERENCES if number in asked) if benchmark.has_published_references else ()


def sample_lines(
    benchmark: Benchmark, questions: Sequence[Question], answers: Sequence[Answer], judgements: Sequence[Judgement]
) -> list[dict[str, Any]]:
    """A line a turn: question, answer, rating, judgement."""
    by_turn = {(judgement.question_id, judgement.turn): judgement for judgement in judgements}
    wrong = _wrong(benchmark, questions)
    lines = []
    for question, answer in zip(questions, answers, strict=True):
        for turn in (1, 2):
            judgement = by_turn[question.question_id, turn]
            lines.append(
                {
                    "task": TASK,
                    "doc_id": question.question_id,
                    "turn": turn,
                    "category": question.category,
                    "prompt_end": question.turns[turn - 1],
                    "response": answer.turns[turn - 1],
                    "metrics": {} if judgement.score == FAILED else {"rating": judgement.score},
                    "judgement": judgement.text,
                    "correct": None,
                    "reference_known_wrong": question.question_id in wrong,
                }
            )
    return lines
