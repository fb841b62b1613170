"""Two checkpoints' answers to MT-Bench side by side: each question is judged twice, with the places exchanged.

A judge prefers a place; a verdict counts where it stays the same after the exchange, and is a tie where it does not.

Source: Zheng et al. 2023, section 3.4 (position bias); FastChat, llm_judge/common.py (play_a_match_pair).
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from evals.judge.ask import FAILED, Judgement, JudgementFile, JudgeRequest
from evals.judge.choose import open_judge
from evals.judged_model import JudgedModel, explain_other_code
from evals.mt_bench.answers import Answer
from evals.mt_bench.data import Benchmark, Question, load_benchmark
from evals.mt_bench.prompts import JudgePrompt
from evals.mt_bench.scores import bootstrap_metric
from evals.mt_bench.setting import (
    MTBenchRequest,
    first_of_each,
    make_result,
    question_fields,
    shared_settings,
    stored_answers,
)
from evals.results import Metric, TaskResult
from megagpt.errors import EvalError

TASK = "mt_bench_against"
VERDICTS = {"A": 1.0, "B": 0.0, "C": 0.5}
"""What the answer in the first place gets."""
_VERDICT = re.compile(r"\[\[([ABC])\]\]")


@dataclass(frozen=True)
class Match:
    """One turn of one question."""

    question: Question
    turn: int
    points: float
    """Of the first checkpoint: 1 won, 0.5 tie, 0 lost; NaN where a verdict is missing."""
    is_consistent: bool
    """Whether both places gave the same verdict."""


def parse_verdict(text: str) -> float:
    """The first `[[A]]`, `[[B]]` or `[[C]]` (tie) as points of the first place; `FAILED` where there is none."""
    found = _VERDICT.search(text)
    return FAILED if found is None else VERDICTS[found.group(1)]


def run_pairwise(
    request: MTBenchRequest, against: MTBenchRequest, on_progress: Callable[[str, int, int], None]
) -> TaskResult:
    """Answer with both checkpoints where answers are missing, judge both orders, count.

    The result is mt_bench_against.json beside the first checkpoint's other results.

    Args:
        request: the checkpoint whose points are counted, and the judge.
        against: the other one.
        on_progress: told what is done (`answers`, `answers of the other`, `judgements` and those with places
            exchanged), how much of it, and of how much.

    Raises:
        EvalError: damaged data, the same weights twice, or a judge that fails; what is stored stands.
    """
    started = time.monotonic()
    benchmark = load_benchmark(request.data_dir)
    questions = first_of_each(benchmark.questions, request.limit)
    one, other = JudgedModel(request.model), JudgedModel(against.model)
    if one.checkpoint.hash == other.checkpoint.hash:
        raise EvalError(f"{against.model.checkpoint}: the same weights as {request.model.checkpoint}; name another")
    mine = stored_answers(one, questions, request.seed, lambda *at: on_progress("answers", *at))
    theirs = stored_answers(other, questions, against.seed, lambda *at: on_progress("answers of the other", *at))
    firsts, seconds = mine.answers, theirs.answers
    judge = open_judge(request.judge, parse_verdict)
    judged = []
    told = explain_other_code(mine.n_other_code + theirs.n_other_code)
    for place, (left, a, right, b) in enumerate(((one, firsts, other, seconds), (other, seconds, one, firsts))):
        names = f"{left.model_id} | {right.model_id}"
        file = JudgementFile(one.out / f"{TASK}.judgements.jsonl", names, judge, parse_verdict)
        what = "judgements" if place == 0 else "judgements with places exchanged"
        requests = pair_requests(benchmark, questions, a, b)
        judged.append(file.judge_all(requests, functools.partial(on_progress, what)))
        told += file.told()
    matches = match_all(questions, judged[0], judged[1])
    failures = sum(judgement.score == FAILED for judgements in judged for judgement in judgements)
    if failures:
        told.insert(0, f"{failures} of {2 * len(matches)} judgements have no verdict; their turns are left out")
    rival = {"run": str(other.checkpoint.run_dir), "step": other.checkpoint.step, "hash": other.checkpoint.hash}
    result = make_result(
        one,
        task=TASK,
        settings={**shared_settings(request, benchmark, questions, judge), "against": rival},
        benchmark=benchmark,
        questions=questions,
        answers=firsts,
        told=told,
        metrics=pair_metrics(matches),
        seconds=time.monotonic() - started,
    )
    return result.write(one.out, _lines(matches, judged))


def _lines(matches: Sequence[Match], judged: Sequence[Sequence[Judgement]]) -> list[dict[str, Any]]:
    """A line a turn for the samples file."""
    return [
        {
            "task": TASK,
            "doc_id": match.question.question_id,
            "turn": match.turn,
            "category": match.question.category,
            "metrics": {} if np.isnan(match.points) else {"points": match.points},
            "consistent": match.is_consistent,
            "judgements": [judgements[index].text for judgements in judged],
            "correct": None,
        }
        for index, match in enumerate(matches)
    ]


def pair_requests(
    benchmark: Benchmark, questions: Sequence[Question], left: Sequence[Answer], right: Sequence[Answer]
) -> list[JudgeRequest]:
    """Two a question, as for single answers, with both answers."""
    requests = []
    for question, a, b in zip(questions, left, right, strict=True):
        math = "" if question.references is None else "-math"
        kind = "v2" if question.references is None else "v1"
        fields = {
            **question_fields(question),
            "answer_a": a.turns[0],
            "answer_b": b.turns[0],
            "answer_a_1": a.turns[0],
            "answer_a_2": a.turns[1],
            "answer_b_1": b.turns[0],
            "answer_b_2": b.turns[1],
        }
        for turn, suffix in ((1, ""), (2, "-multi-turn")):
            prompt: JudgePrompt = benchmark.prompts[f"pair{math}-{kind}{suffix}"]
            requests.append(JudgeRequest(question.question_id, turn, prompt.name, prompt.system, prompt.fill(fields)))
    return requests


def match_all(
    questions: Sequence[Question], straight: Sequence[Judgement], exchanged: Sequence[Judgement]
) -> list[Match]:
    """A verdict that an exchange of places turns around is a tie."""
    by_id = {question.question_id: question for question in questions}
    matches = []
    for first, second in zip(straight, exchanged, strict=True):
        match = Match(by_id[first.question_id], first.turn, float("nan"), is_consistent=False)
        if FAILED not in (first.score, second.score):
            same = first.score == 1.0 - second.score
            match = replace(match, points=first.score if same else 0.5, is_consistent=same)
        matches.append(match)
    return matches


def pair_metrics(matches: Sequence[Match]) -> dict[str, Metric]:
    """Share of points (a tie is half a win), of wins, ties, losses and consistent verdicts; resampling questions."""
    ids = list(dict.fromkeys(match.question.question_id for match in matches))
    points = np.full((len(ids), 2), np.nan)  # (Q, 2)
    consistent = np.full((len(ids), 2), np.nan)
    for match in matches:
        place = ids.index(match.question.question_id), match.turn - 1
        points[place] = match.points
        if not np.isnan(match.points):
            consistent[place] = float(match.is_consistent)
    parts = {
        "points": points,
        **{
            name: np.where(np.isnan(points), np.nan, points == value)
            for name, value in (("wins", 1.0), ("ties", 0.5), ("losses", 0.0))
        },
        "consistent": consistent,
    }
    found = {name: bootstrap_metric(part) for name, part in parts.items()}
    return {
        name: replace(metric, higher_is_better=name not in ("ties", "losses"))
        for name, metric in found.items()
        if metric is not None
    }
