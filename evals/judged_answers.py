"""An instruction-tuned checkpoint's answers to a held-out set, each scored from 0 to 100 against the right one.

The set is Alpaca-style: rows {instruction, input, output}. Answers are stored first, judged after; both are gone on
with after a kill.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance

from evals.chat import ChatTemplate
from evals.judge.ask import FAILED, Judgement, JudgementFile, JudgeRequest
from evals.judge.choose import JudgeOptions, open_judge
from evals.judged_model import JudgedModel, ModelRequest, explain_other_code
from evals.lines import append_line, read_lines
from evals.mt_bench.scores import bootstrap_metric
from evals.results import TaskResult
from megagpt.errors import EvalError

JUDGE_PROMPT = (
    "Grade the answer of a language model to an instruction, by comparison with an answer that is right.\n\n"
    "[Instruction]\n{instruction}\n\n[Right answer]\n{reference}\n\n[Model's answer]\n{response}\n[End]\n\n"
    "How well does the model's answer do what was asked? 0 means not at all, 100 as well as the right answer. "
    "Reply with a whole number from 0 to 100 and nothing else."
)
PROMPT_NAME = "megagpt-answers-v1"
_SCORE = re.compile(r"\W*(?:score\W*)?(\d{1,3})(?:\.0+)?(?:\s*/\s*100)?\W*", re.IGNORECASE)
_MARKED = re.compile(r"\[\[(\d{1,3})\]\]")


@dataclass(frozen=True)
class Row:
    """One line of the held-out set."""

    number: int
    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class AnswersRequest:
    """Which set, whom to ask, and who judges."""

    model: ModelRequest
    file: Path
    judge: JudgeOptions
    limit: int | None = None
    """Only the first rows; None for all."""
    max_new_tokens: int = 256


@dataclass(frozen=True)
class ScoredRow:
    """What the judge made of an answer; no score where none is in its words."""

    row: Row
    response: str
    judgement: Judgement
    truncated: bool

    @property
    def score(self) -> float | None:
        """0 to 100."""
        return None if self.judgement.score == FAILED else self.judgement.score


def parse_score(text: str) -> float:
    """A judgement that is nothing but a whole number from 0 to 100, or marks one as `[[85]]`; else `FAILED`.

    A number somewhere in a sentence is no score: it may be a count, a year, or part of the answer.
    """
    marked = _MARKED.findall(text)
    found = marked[-1] if marked else (match.group(1) if (match := _SCORE.fullmatch(text.strip())) else None)
    return float(found) if found is not None and int(found) <= 100 else FAILED


def load_rows(path: Path) -> list[Row]:
    """A JSON list, or a file of JSON lines.

    Raises:
        EvalError: absent, empty, damaged, or a row without instruction and output.
    """
    if not path.is_file():
        raise EvalError(f"{path}: no such file of instructions")
    if path.suffix == ".jsonl":
        content: Any = read_lines(path)
    else:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EvalError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, list) or not content:
        raise EvalError(f"{path}: expected a list of rows {{instruction, input, output}}, and at least one")
    return [_row(number, item, path) for number, item in enumerate(content)]


def run_answers(
    request: AnswersRequest, on_progress: Callable[[str, int, int], None]
) -> tuple[TaskResult, list[ScoredRow]]:
    """Answer, judge, score.

    Files: <run>/evals/step_<step>/answers_<file>.json, .answers.jsonl, .judgements.jsonl, .samples.jsonl.

    Args:
        request: what, whom, by whom.
        on_progress: told what is done (`answers`, `judgements`), how much of it, and of how much.

    Raises:
        EvalError: a damaged file, or a judge that fails; what is stored stands.
        CheckpointError: no checkpoint that can be used.
    """
    started = time.monotonic()
    all_rows = load_rows(request.file)
    rows = all_rows[: request.limit]
    model = JudgedModel(request.model)
    judge = open_judge(request.judge, parse_score)
    task = f"answers_{request.file.stem}"
    max_new_tokens = min(request.max_new_tokens, model.max_seq_len // 2)
    answers, n_other_code = _answer_all(
        model, rows, max_new_tokens, model.out / f"{task}.answers.jsonl", lambda *at: on_progress("answers", *at)
    )
    requests = [judge_request(row, answers[row.number][0]) for row in rows]
    file = JudgementFile(model.out / f"{task}.judgements.jsonl", model.model_id, judge, parse_score)
    judgements = file.judge_all(requests, lambda *at: on_progress("judgements", *at))
    scored = [
        ScoredRow(row, *answers[row.number][:1], judgement, answers[row.number][1])
        for row, judgement in zip(rows, judgements, strict=True)
    ]
    settings = {
        "limit": request.limit,
        "judge": judge.name,
        "judge_settings": dict(judge.settings),
        "judge_prompt": JUDGE_PROMPT,
        "max_new_tokens": max_new_tokens,
        "temperature": 0,
    }
    values = np.array([[np.nan if found.score is None else found.score] for found in scored])
    metric = bootstrap_metric(values)
    failures = sum(found.score is None for found in scored)
    told = [f"{failures} of {len(rows)} judgements have no score and are left out"] if failures else []
    told += [*explain_other_code(n_other_code), *file.told()]
    result = TaskResult(
        **model.header(task, settings, {"path_or_id": str(request.file), "sha256": _sha256(request.file)}),
        status="ok",
        reason="; ".join(told),
        task_version="1",
        n_shots=0,
        n=len(rows),
        n_total=len(all_rows),
        metrics={} if metric is None else {"score": metric},
        truncated=sum(found.truncated for found in scored),
        seconds=time.monotonic() - started,
    )
    return result.write(model.out, [_sample(task, found) for found in scored]), scored


def judge_request(row: Row, response: str) -> JudgeRequest:
    """What the judge is shown."""
    instruction = f"{row.instruction}\n\n{row.input}" if row.input else row.instruction
    text = JUDGE_PROMPT.format(instruction=instruction, reference=row.output, response=response)
    return JudgeRequest(row.number, 1, PROMPT_NAME, "", text)


def extremes(scored: Sequence[ScoredRow], n: int) -> tuple[list[ScoredRow], list[ScoredRow]]:
    """The n worst and the n best answers that have a score; none is in both."""
    ranked = sorted((found for found in scored if found.score is not None), key=lambda found: found.score or 0.0)
    n_worst = min(n, (len(ranked) + 1) // 2)
    return ranked[:n_worst], ranked[n_worst:][-n:][::-1]


def format_extremes(scored: Sequence[ScoredRow], n: int = 3) -> str:
    """Worst and best answers for the terminal."""
    lines = []
    for title, found in zip(("worst", "best"), extremes(scored, n), strict=True):
        for one in found:
            lines.append(f"{title} {one.score:g}: {_short(one.row.instruction)}")
            lines.append(f"    right:  {_short(one.row.output)}")
            lines.append(f"    answer: {_short(one.response)}")
    return "\n".join(lines)


def _answer_all(
    model: JudgedModel, rows: Sequence[Row], max_new_tokens: int, path: Path, on_progress: Callable[[int, int], None]
) -> tuple[dict[int, tuple[str, bool]], int]:
    """Row number -> (answer, whether its prompt was cut), greedy, stored batch by batch; how many are made again."""
    template = model.template
    prompts = {row.number: template.prompt([(_user_text(row, template.name), None)]) for row in rows}
    settings = {"hash": model.checkpoint.hash, "dtype": model.request.dtype, "max_new_tokens": max_new_tokens}
    by_code = {**settings, "tokenizer": model.tokenizer.fingerprint, "code": model.code}
    identities = {number: _identity(by_code, template, prompt) for number, prompt in prompts.items()}
    without_code = {number: _identity(settings, template, prompt) for number, prompt in prompts.items()}
    lines = read_lines(path)
    stored = {row.get("identity"): row for row in lines}
    of_other_code = {row.get("identity_without_code", row.get("identity")) for row in lines}
    known = {
        number: (stored[identity]["response"], bool(stored[identity]["truncated"]))
        for number, identity in identities.items()
        if identity in stored
    }
    on_progress(len(known), len(rows))
    missing = [number for number in prompts if number not in known]
    n_other_code = sum(without_code[number] in of_other_code for number in missing)
    arguments = {"until": list(template.stops), "max_gen_toks": max_new_tokens, "do_sample": False}
    for start in range(0, len(missing), model.request.batch_size):
        batch = missing[start : start + model.request.batch_size]
        texts = model.lm.generate_until(
            [
                Instance("generate_until", {}, (prompts[number], arguments), 0, metadata=("answers", number, 1))
                for number in batch
            ]
        )
        cut = model.lm.truncated.get("answers", set())
        for number, text in zip(batch, texts, strict=True):
            known[number] = (text.strip(), number in cut)
            identity = {"identity": identities[number], "identity_without_code": without_code[number]}
            append_line(path, {"id": number, **identity, "response": text.strip(), "truncated": number in cut})
        on_progress(len(known), len(rows))
    return known, n_other_code


def _identity(settings: dict[str, Any], template: ChatTemplate, prompt: str) -> str:
    return hashlib.sha256(json.dumps([settings, asdict(template), prompt]).encode()).hexdigest()


def _user_text(row: Row, template: str) -> str:
    if not row.input:
        return row.instruction
    return (
        f"{row.instruction}\n\n### Input:\n{row.input}" if template == "alpaca" else f"{row.instruction}\n{row.input}"
    )


def _row(number: int, item: Any, path: Path) -> Row:
    if not isinstance(item, dict):
        raise EvalError(f"{path}: row {number} is {type(item).__name__}, expected {{instruction, input, output}}")
    fields: dict[str, Any] = {
        name: item.get(name, "" if name == "input" else None) for name in ("instruction", "input", "output")
    }
    wrong = [name for name, value in fields.items() if not isinstance(value, str)]
    if wrong:
        raise EvalError(f"{path}: row {number}: {', '.join(wrong)} must be text")
    return Row(number, **fields)


def _sample(task: str, found: ScoredRow) -> dict[str, Any]:
    return {
        "task": task,
        "doc_id": found.row.number,
        "prompt_end": f"{found.row.instruction}\n{found.row.input}".strip(),
        "target": found.row.output,
        "response": found.response,
        "metrics": {} if found.score is None else {"score": found.score},
        "judgement": found.judgement.text,
        "correct": None,
    }


def _short(text: str, length: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 3]}..."


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
