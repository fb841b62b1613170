"""`megagpt eval mt-bench`: answers, judgements, one result."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from evals.judge.ask import FAILED, Judgement, JudgementFile, JudgeRequest
from evals.judge.choose import open_judge
from evals.judged_model import JudgedModel, explain_other_code
from evals.mt_bench.answers import Answer, room_for_answers
from evals.mt_bench.data import TEMPERATURES, Benchmark, Question, load_benchmark
from evals.mt_bench.rating import parse_rating
from evals.mt_bench.scores import MTBenchScores, score
from evals.mt_bench.setting import (
    TASK,
    MTBenchRequest,
    first_of_each,
    make_result,
    question_fields,
    shared_settings,
    stored_answers,
    wrong_references,
)
from evals.results import TaskResult


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
    answered = stored_answers(model, questions, request.seed, lambda *at: on_progress("answers", *at))
    answers = answered.answers
    requests = judge_requests(benchmark, questions, answers)
    judged = JudgementFile(model.out / f"{TASK}.judgements.jsonl", model.model_id, judge, parse_rating)
    judgements = judged.judge_all(requests, lambda *at: on_progress("judgements", *at))
    scores = score(questions, judgements, has_published_references=benchmark.has_published_references)
    result = make_result(
        model,
        task=TASK,
        settings={
            **shared_settings(request, benchmark, questions, judge),
            "judge_temperature": 0,
            "temperatures": TEMPERATURES,
            "max_new_tokens": room_for_answers(model.max_seq_len),
            "template_text": model.template.prompt([("...", None)]),
        },
        benchmark=benchmark,
        questions=questions,
        answers=answers,
        told=[*explain_failures(scores), *explain_other_code(answered.n_other_code), *judged.told()],
        metrics=scores.metrics,
        subtasks=scores.categories,
        seconds=time.monotonic() - started,
    )
    return result.write(model.out, sample_lines(benchmark, questions, answers, judgements))


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
            **question_fields(question),
            "answer": answer.turns[0],
            "answer_1": answer.turns[0],
            "answer_2": answer.turns[1],
        }
        for turn, name in ((1, f"single{math}-v1"), (2, f"single{math}-v1-multi-turn")):
            prompt = benchmark.prompts[name]
            requests.append(JudgeRequest(question.question_id, turn, name, prompt.system, prompt.fill(fields)))
    return requests


def explain_failures(scores: MTBenchScores) -> list[str]:
    """That judgements are left out, where some are."""
    if not scores.failures:
        return []
    return [f"{scores.failures} of {scores.n_judged} judgements have no rating and are left out"]


def sample_lines(
    benchmark: Benchmark, questions: Sequence[Question], answers: Sequence[Answer], judgements: Sequence[Judgement]
) -> list[dict[str, Any]]:
    """A line a turn: question, answer, rating, judgement."""
    by_turn = {(judgement.question_id, judgement.turn): judgement for judgement in judgements}
    wrong = wrong_references(benchmark, questions)
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
