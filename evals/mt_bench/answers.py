"""The model's answers to both turns: stored as they come, in FastChat's format, and gone on with after a kill."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from evals.backend import MegaGPTLM
from evals.chat import ChatTemplate
from evals.lines import append_line, read_lines
from evals.mt_bench.data import TEMPERATURES, Question

MAX_NEW_TOKENS = 1024
"""Of an answer. Source: FastChat, llm_judge/gen_model_answer.py."""


BY_CODE = ("code", "tokenizer")
"""The settings that no option of the user's changes: where they alone differ, the user is told why he waits."""


@dataclass(frozen=True)
class AnswerSettings:
    """What decides an answer, beside weights and question."""

    checkpoint_hash: str
    dtype: str
    template: ChatTemplate
    max_new_tokens: int
    tokenizer: str
    """Fingerprint."""
    code: str
    """Of what computes and writes answers (`evals.answers.code_version`)."""
    seed: int = 0

    def identity(self, question: Question) -> str:
        """sha256 of all of it."""
        return _hash(self._content(question))

    def identity_without_code(self, question: Question) -> str:
        """sha256 of all but code and tokenizer; before they were part of it, this was the identity."""
        return _hash({name: value for name, value in self._content(question).items() if name not in BY_CODE})

    def _content(self, question: Question) -> dict[str, Any]:
        return {**asdict(self), "question": asdict(question), "temperature": TEMPERATURES[question.category]}


@dataclass(frozen=True)
class Answer:
    """Both turns of one question."""

    question_id: int
    turns: tuple[str, str]
    truncated: bool
    """Whether a turn's prompt lost its beginning because it exceeds the model's context."""


@dataclass(frozen=True)
class Answered:
    """The answers that were asked for."""

    answers: list[Answer]
    """In the questions' order."""
    n_other_code: int
    """Of them those that the file had from other code or another tokenizer, and that were made again."""


def room_for_answers(max_length: int) -> int:
    """New tokens a turn: FastChat's 1,024, and half of the context at most."""
    return min(MAX_NEW_TOKENS, max_length // 2)


def answer_all(
    get_lm: Callable[[], MegaGPTLM],
    questions: Sequence[Question],
    settings: AnswerSettings,
    path: Path,
    model_id: str,
    on_progress: Callable[[int, int], None],
) -> Answered:
    """Answers in the questions' order; those that the file has for the same settings are not made again.

    Args:
        get_lm: makes a fresh backend, whose truncation counts are read; called where an answer is missing.
        questions: each with two turns.
        settings: what decides the answers.
        path: jsonl that grows with every batch.
        model_id: name in the file.
        on_progress: told how many questions are answered, and of how many.
    """
    wanted = {settings.identity(question): question for question in questions}
    rows = read_lines(path)
    known = {wanted[row["identity"]].question_id: _from_row(row) for row in rows if row.get("identity") in wanted}
    on_progress(len(known), len(questions))
    missing = [question for question in questions if question.question_id not in known]
    of_other_code = {row.get("identity_without_code", row.get("identity")) for row in rows}
    n_other_code = sum(settings.identity_without_code(question) in of_other_code for question in missing)
    missing.sort(key=lambda question: TEMPERATURES[question.category])  # a batch has one temperature
    if not missing:
        return Answered([known[question.question_id] for question in questions], 0)
    lm = get_lm()
    for start in range(0, len(missing), lm.batch_size):
        batch = missing[start : start + lm.batch_size]
        for question, answer in zip(batch, _answer_batch(lm, batch, settings), strict=True):
            append_line(path, to_row(question, answer, settings, model_id))
            known[question.question_id] = answer
        on_progress(len(known), len(questions))
    return Answered([known[question.question_id] for question in questions], n_other_code)


def _answer_batch(lm: MegaGPTLM, batch: Sequence[Question], settings: AnswerSettings) -> list[Answer]:
    firsts = _continue(lm, batch, [[(question.turns[0], None)] for question in batch], settings, turn=1)
    talks = [
        [(question.turns[0], first), (question.turns[1], None)] for question, first in zip(batch, firsts, strict=True)
    ]
    seconds = _continue(lm, batch, talks, settings, turn=2)
    cut = lm.truncated.get("mt_bench", set())
    return [
        Answer(question.question_id, (first, second), question.question_id in cut)
        for question, first, second in zip(batch, firsts, seconds, strict=True)
    ]


def _continue(
    lm: MegaGPTLM,
    batch: Sequence[Question],
    talks: Sequence[Sequence[tuple[str, str | None]]],
    settings: AnswerSettings,
    turn: int,
) -> list[str]:
    requests = []
    for question, talk in zip(batch, talks, strict=True):
        temperature = TEMPERATURES[question.category]
        arguments: dict[str, Any] = {
            "until": list(settings.template.stops),
            "max_gen_toks": settings.max_new_tokens,
            "do_sample": temperature > 0,
        }
        if temperature > 0:
            # A seed for each question and turn: what one draws depends on no other that shares its batch.
            seed = settings.seed * 1_000_000 + question.question_id * 10 + turn
            arguments |= {"temperature": temperature, "seed": seed}
        requests.append(
            Instance(
                request_type="generate_until",
                doc={},
                arguments=(settings.template.prompt(talk), arguments),
                idx=0,
                metadata=("mt_bench", question.question_id, 1),
            )
        )
    return [text.strip() for text in lm.generate_until(requests)]


def to_row(question: Question, answer: Answer, settings: AnswerSettings, model_id: str) -> dict[str, Any]:
    """A line of the file."""
    identity = settings.identity(question)
    return {
        "question_id": answer.question_id,
        "answer_id": identity[:22],
        "model_id": model_id,
        "choices": [{"index": 0, "turns": list(answer.turns)}],
        "tstamp": time.time(),
        "identity": identity,
        "identity_without_code": settings.identity_without_code(question),
        "truncated": answer.truncated,
    }


def _from_row(row: dict[str, Any]) -> Answer:
    first, second = row["choices"][0]["turns"]
    return Answer(row["question_id"], (first, second), bool(row["truncated"]))


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
