"""MT-Bench's files in the user's folder: questions, reference answers, judge prompts; checked first."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.lines import read_lines
from evals.mt_bench.prompts import NAMES, OWN_PROMPTS, JudgePrompt
from megagpt.atomic import write_file
from megagpt.errors import EvalError

QUESTIONS = "question.jsonl"
REFERENCES = "reference_answer/gpt-4.jsonl"
JUDGE_PROMPTS = "judge_prompts.jsonl"
N_QUESTIONS = 80
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""Category -> temperature of the answers; ten questions each. Source: FastChat, llm_judge/common.py."""
WITH_REFERENCE = frozenset({"math", "reasoning", "coding"})
WRONG_REFERENCES = (104, 105, 109, 111, 113, 114, 120, 122, 124, 125, 126, 128, 130)
"""Questions whose published reference answer is wrong in a turn at least. Source: lm-sys/FastChat pull request 3158."""
SHA256 = {
    QUESTIONS: "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    REFERENCES: "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    JUDGE_PROMPTS: "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
}
"""Of lm-sys/FastChat at commit 0e6d3e4b."""


@dataclass(frozen=True)
class Question:
    """Two turns and, in three categories, what a right answer to each is."""

    question_id: int
    category: str
    turns: tuple[str, str]
    references: tuple[str, str] | None


@dataclass(frozen=True)
class Benchmark:
    """What the folder holds."""

    folder: Path
    questions: list[Question]
    prompts: dict[str, JudgePrompt]
    prompts_origin: str
    """`official` (the user's file) or `megagpt`."""
    sha256: dict[str, str]
    """File -> hash; of those that are there."""

    @property
    def has_published_references(self) -> bool:
        """Whether the reference answers are the published ones, of which some are known to be wrong."""
        return self.sha256.get(REFERENCES) == SHA256[REFERENCES]

    def digest(self) -> str:
        """sha256 of all files' hashes."""
        lines = [f"{name} {digest}\n" for name, digest in sorted(self.sha256.items())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def find_folder(data_dir: Path) -> Path:
    """`data_dir`/mt_bench, or `data_dir` itself.

    Raises:
        EvalError: neither has the questions.
    """
    for folder in (data_dir / "mt_bench", data_dir):
        if (folder / QUESTIONS).is_file():
            return folder
    raise EvalError(
        f"{data_dir}: neither mt_bench/{QUESTIONS} nor {QUESTIONS} is there; get fastchat/llm_judge/data/mt_bench of "
        "github.com/lm-sys/FastChat"
    )


def load_benchmark(data_dir: Path) -> Benchmark:
    """Read and check.

    Raises:
        EvalError: not the 80 questions, a reference is missing, or a file is damaged.
    """
    folder = find_folder(data_dir)
    rows = read_lines(folder / QUESTIONS)
    references = {_integer(row, folder / REFERENCES): _turns_of(row) for row in read_lines(folder / REFERENCES)}
    questions = [_question(row, references, folder / QUESTIONS) for row in rows]
    found = Counter(question.category for question in questions)
    if len({question.question_id for question in questions}) != N_QUESTIONS or found != dict.fromkeys(TEMPERATURES, 10):
        told = ", ".join(f"{category} {n}" for category, n in sorted(found.items()))
        raise EvalError(
            f"{folder / QUESTIONS}: {len(questions)} questions ({told}), expected {N_QUESTIONS}, 10 of each category: "
            "a part of a benchmark is not that benchmark"
        )
    official = folder / JUDGE_PROMPTS
    prompts = _read_prompts(official) if official.is_file() else OWN_PROMPTS
    hashes = {name: _sha256(folder / name) for name in SHA256 if (folder / name).is_file()}
    return Benchmark(folder, questions, prompts, "official" if official.is_file() else "megagpt", hashes)


def copy_files(source: Path, out: Path) -> None:
    """Put MT-Bench's files beside the prepared benchmarks, where `source` has all of them."""
    try:
        found = load_benchmark(source)
    except EvalError:
        return  # `describe` says why
    for name in found.sha256:
        write_file(out / "mt_bench" / name, (found.folder / name).read_bytes())


def describe(data_dir: Path) -> str:
    """A line for `megagpt eval doctor`."""
    try:
        found = load_benchmark(data_dir)
    except EvalError as error:
        return f"mt_bench: unavailable: {error}"
    known = [name for name, digest in found.sha256.items() if digest == SHA256[name]]
    differs = sorted(set(found.sha256) - set(known))
    warning = (
        f"; {len(WRONG_REFERENCES)} of 30 references are known to be wrong" if found.has_published_references else ""
    )
    copies = f"; not the published copies: {', '.join(differs)}" if differs else "; sha256 known"
    return f"mt_bench: ok: {N_QUESTIONS} questions, judge prompts: {found.prompts_origin}{copies}{warning}"


def _question(row: dict[str, Any], references: dict[int, tuple[str, str]], path: Path) -> Question:
    question_id, category = _integer(row, path), str(row.get("category"))
    turns = row.get("turns")
    if not (isinstance(turns, list) and len(turns) == 2 and all(isinstance(turn, str) for turn in turns)):
        raise EvalError(f"{path}: question {question_id}: turns is not a list of two texts")
    if category in WITH_REFERENCE and question_id not in references:
        raise EvalError(
            f"{path.parent / REFERENCES}: no reference answer to question {question_id} ({category}), without which "
            "this category is not judged"
        )
    reference = references.get(question_id) if category in WITH_REFERENCE else None
    return Question(question_id, category, (turns[0], turns[1]), reference)


def _turns_of(row: dict[str, Any]) -> tuple[str, str]:
    try:
        first, second = row["choices"][0]["turns"]
        return str(first), str(second)
    except (KeyError, IndexError, TypeError, ValueError):
        raise EvalError(
            f"reference answer to question {row.get('question_id')}: choices[0].turns is not two texts"
        ) from None


def _read_prompts(path: Path) -> dict[str, JudgePrompt]:
    rows = {str(row.get("name")): row for row in read_lines(path)}
    missing = sorted(set(NAMES) - set(rows))
    if missing:
        raise EvalError(f"{path}: no prompt {', '.join(missing)}")
    prompts = {}
    for name in NAMES:
        system, template = rows[name].get("system_prompt"), rows[name].get("prompt_template")
        if not isinstance(system, str) or not isinstance(template, str):
            raise EvalError(f"{path}: prompt {name}: system_prompt and prompt_template must be texts")
        prompts[name] = JudgePrompt(name, system, template)
        prompts[name].fill(dict.fromkeys(NAMES[name], ""))
    return prompts


def _integer(row: dict[str, Any], path: Path) -> int:
    value = row.get("question_id")
    if not isinstance(value, int):
        raise EvalError(f"{path}: question_id is {value!r}, expected a whole number")
    return value


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
