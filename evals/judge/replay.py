"""Judgements that were made before, read from a file of FastChat's format or ours; nothing is asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from evals.judge.ask import JudgeRequest
from evals.lines import read_lines
from megagpt.errors import EvalError


class ReplayJudge:
    """Looks a judgement up by question and turn, and checks that it was made for this very answer."""

    def __init__(self, path: Path, parse: Callable[[str], float], model_id: str | None = None) -> None:
        """Read the file.

        Args:
            parse: a judgement's text -> its rating.
            path: jsonl with question_id, turn, judgment, user_prompt; model and judge where there are several.
            model_id: of whose answers; needed where the file has judgements of several models.

        Raises:
            EvalError: absent, damaged, or ambiguous.
        """
        if not path.is_file():
            raise EvalError(f"{path}: no such file of judgements")
        rows = read_lines(path)
        models = sorted({str(row.get("model")) for row in rows})
        if model_id is not None and model_id in models:
            rows = [row for row in rows if str(row.get("model")) == model_id]
        elif len(models) > 1:
            raise EvalError(f"{path}: judgements of {', '.join(models)}; name one with --judge-model")
        self.path = path
        self._parse = parse
        self._sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self._rows: dict[tuple[int, int], dict[str, Any]] = {}
        for row in rows:
            key = (_integer(row, "question_id", path), _integer(row, "turn", path))
            if key in self._rows:
                raise EvalError(f"{path}: question {key[0]} turn {key[1]} is judged twice; keep one of the lines")
            self._rows[key] = row

    @property
    def name(self) -> str:
        """The judge that the file names, marked as replayed."""
        judges = sorted({str(_first(row.get("judge"))) for row in self._rows.values()})
        return f"replayed: {', '.join(judges) or 'nobody'}"

    @property
    def settings(self) -> dict[str, Any]:
        """The file, and what its lines say of the judge that they came from."""
        said = {json.dumps(row.get("judge_settings"), sort_keys=True) for row in self._rows.values()}
        return {"kind": "replay", "sha256": self._sha256, "said": [json.loads(one) for one in sorted(said)]}

    def ask_all(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[JudgeRequest, str]]:
        """What the file has for each.

        Raises:
            EvalError: no judgement, one of another answer, or a score that its text does not bear.
        """
        for request in requests:
            yield request, self._find(request)

    def _find(self, request: JudgeRequest) -> str:
        where = f"{self.path}: question {request.question_id} turn {request.turn}"
        row = self._rows.get((request.question_id, request.turn))
        if row is None:
            raise EvalError(f"{where}: there is no judgement")
        text = row.get("judgment")
        if not isinstance(text, str):
            raise EvalError(f"{where}: judgment is {type(text).__name__}, expected text")
        if row.get("user_prompt") != request.user:
            raise EvalError(
                f"{where}: the judgement was made for another answer, question or prompt (user_prompt differs); "
                "judge these answers anew"
            )
        score = row.get("score")
        if score is not None and score != (found := self._parse(text)):
            raise EvalError(f"{where}: score is {score!r}, but the judgement's text says {found}; correct either")
        return text


def _integer(row: dict[str, Any], key: str, path: Path) -> int:
    value = row.get(key)
    if not isinstance(value, int):
        raise EvalError(f"{path}: {key} is {value!r} in a line, expected a whole number")
    return value


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value
