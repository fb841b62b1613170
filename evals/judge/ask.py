"""Questions to a judge, and its judgements in a file that is written as they come.

One line a judgement, in FastChat's format (question_id, model, judge, user_prompt, judgment, score, turn, tstamp; ours
has system_prompt and judge_settings beside), so that either can read the other's. A judgement is kept for the very text
that was judged and for all that decides what the judge says of it: another answer, another prompt or another judge is
asked anew, and so is the same judge in another chat format, on another server or in other code. A line that does not
say how its judgement was made (FastChat's, or one of an older version) stays in the file and is not used; to use such
judgements is `replay:FILE`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from evals.lines import append_line, read_lines
from megagpt.errors import EvalError

FAILED = -1.0
"""The score of a judgement in which no rating is found, as in FastChat."""


@dataclass(frozen=True)
class JudgeRequest:
    """What a judge is shown."""

    question_id: int
    turn: int
    """1 or 2; what has no turns has 1."""
    prompt_name: str
    system: str
    """May be empty."""
    user: str


@dataclass(frozen=True)
class Judgement:
    """What it said."""

    question_id: int
    turn: int
    text: str
    score: float
    """`FAILED` where no rating is in the text."""


class Judge(Protocol):
    """Anything that answers prompts."""

    @property
    def name(self) -> str:
        """Which one; stored with every judgement, and without any secret."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that decides what it says of a prompt, as JSON has it; stored too, and without any secret."""

    def ask_all(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[JudgeRequest, str]]:
        """Answers as they come, in any order.

        Raises:
            EvalError: the judge cannot be reached or refuses; what was yielded before stands.
        """


class JudgementFile:
    """Judgements of one model's answers by one judge."""

    def __init__(self, path: Path, model_id: str, judge: Judge, parse: Callable[[str], float]) -> None:
        """Open or begin a file.

        Args:
            path: jsonl.
            model_id: whose answers are judged.
            judge: who is asked.
            parse: a judgement's text -> its rating, or `FAILED`.
        """
        self.path = path
        self.model_id = model_id
        self.judge = judge
        self.parse = parse
        self.n_unsaid = 0
        """Judgements that `judge_all` found and had made again, since their lines do not say how they were made."""
        self.n_other_code = 0
        """Likewise, since other code made them."""

    def told(self) -> list[str]:
        """What a reader of the result must know of judgements that were there and not used."""
        parts = []
        if self.n_unsaid:
            parts.append(f"{self.n_unsaid} stored judgements do not say how they were made: judged again")
        if self.n_other_code:
            parts.append(f"{self.n_other_code} stored judgements were made by other code: judged again")
        return parts

    def judge_all(self, requests: Sequence[JudgeRequest], on_progress: Callable[[int, int], None]) -> list[Judgement]:
        """A judgement for each request, in their order; those of the file first.

        Raises:
            EvalError: the judge fails; the file keeps what there is, and the next call goes on from there.
        """
        texts = self._known(requests)
        on_progress(len(texts), len(requests))
        missing = [request for request in requests if (request.question_id, request.turn) not in texts]
        try:
            for request, text in self.judge.ask_all(missing):
                append_line(self.path, self._row(request, text))
                texts[request.question_id, request.turn] = text
                on_progress(len(texts), len(requests))
        except EvalError as error:
            raise EvalError(
                f"{error}; {len(texts)} of {len(requests)} judgements are in {self.path}: the same command goes on"
            ) from None
        return [
            Judgement(request.question_id, request.turn, text, self.parse(text))
            for request in requests
            for text in (texts[request.question_id, request.turn],)
        ]

    def _known(self, requests: Sequence[JudgeRequest]) -> dict[tuple[int, int], str]:
        wanted = {self._identity(request): request for request in requests}
        ours = json.loads(json.dumps(self.judge.settings))
        found: dict[tuple[int, int], str] = {}
        unsaid: set[tuple[int, int]] = set()
        other_code: set[tuple[int, int]] = set()
        for row in read_lines(self.path):
            names = row.get("judge")
            name, prompt = names if isinstance(names, list) and len(names) == 2 else (None, None)
            parts = (row.get("question_id"), row.get("turn"), row.get("model"), name, prompt, row.get("user_prompt"))
            key = tuple(map(str, parts))
            if key not in wanted or row.get("system_prompt", wanted[key].system) != wanted[key].system:
                continue
            place = wanted[key].question_id, wanted[key].turn
            theirs = row.get("judge_settings")
            if not isinstance(theirs, dict):
                unsaid.add(place)
            elif theirs == ours and isinstance(row.get("judgment"), str):
                found[place] = row["judgment"]
            elif {**theirs, "code": None} == {**ours, "code": None}:
                other_code.add(place)
        self.n_other_code = len(other_code - found.keys())
        self.n_unsaid = len(unsaid - other_code - found.keys())
        return found

    def _identity(self, request: JudgeRequest) -> tuple[str, ...]:
        numbers = str(request.question_id), str(request.turn)
        return (*numbers, self.model_id, self.judge.name, request.prompt_name, request.user)

    def _row(self, request: JudgeRequest, text: str) -> dict[str, Any]:
        return {
            "question_id": request.question_id,
            "model": self.model_id,
            "judge": [self.judge.name, request.prompt_name],
            "user_prompt": request.user,
            "system_prompt": request.system,
            "judge_settings": self.judge.settings,
            "judgment": text,
            "score": self.parse(text),
            "turn": request.turn,
            "tstamp": time.time(),
        }
