"""What each benchmark's public files look like, and the rows that lm-eval's task definitions expect of the hub.

One reader a benchmark. Counts are the official ones; hashes name the exact public copies that were checked.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagpt.errors import EvalError

Rows = list[dict[str, Any]]
Configs = dict[str, dict[str, Rows]]
"""Config of the hub's data set -> split -> rows."""

MMLU_SUBJECTS = 57
MMLU_TEST_ROWS = 14042

OFFICIAL_DOCUMENTS: dict[str, int] = {
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "hellaswag": 10042,
    "gsm8k": 1319,
    "truthfulqa_mc1": 817,
    "truthfulqa_mc2": 817,
    "truthfulqa_gen": 817,
    "piqa": 1838,
    "winogrande": 1267,
    "lambada_openai": 5153,
    "boolq": 3270,
    "openbookqa": 500,
}
"""Task -> documents that are scored, of the split that its definition takes."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark in its public files."""

    name: str
    folder: str
    """Below the source folder."""
    files: tuple[str, ...]
    """Files or globs below `folder`; all are needed."""
    hub_id: str
    rows: dict[str, int]
    """Split -> official number of rows, over all configs."""
    read: Callable[[Path], Configs]
    sha256: dict[str, str] = field(default_factory=dict)
    """File below `folder` -> hash of the copy that was checked; `*` for all files, sorted, one after the other."""
    absent_splits: tuple[str, ...] = ()
    """Splits that the hub has and these files do not; tasks declare them null."""
    origin: str = ""
    """Where the files are published."""


def _read_arc(config: str) -> Callable[[Path], Configs]:
    def read(folder: Path) -> Configs:
        splits = {}
        for split in ("train", "test"):
            path = folder / f"llm_adapters_{config}.{split}.json"
            items = _load_json(path)
            splits[split] = [_arc_row(item, f"{config}/{split}/{i}", path) for i, item in enumerate(items)]
        return {config: splits}

    return read


def _arc_row(item: dict[str, str], row_id: str, path: Path) -> dict[str, Any]:
    """`{instruction, answer}` of LLM-Adapters -> the hub's row."""
    intro, tail = "Please choose the correct answer to the question: ", "\n\nAnswer format: "
    head, found, names = item["instruction"].rpartition(tail)
    question, has_choices, choices_text = head.removeprefix(intro).rpartition("\n\nAnswer1: ")
    if not found or not has_choices or not head.startswith(intro):
        raise EvalError(
            f"{path}: {row_id}: instruction is not of the form '{intro}... Answer1: ... Answer format: ...'"
        )
    n_choices = len(names.split("/"))
    texts = []
    rest = choices_text
    for number in range(2, n_choices + 1):
        text, cut, rest = rest.partition(f" Answer{number}: ")
        if not cut:
            raise EvalError(f"{path}: {row_id}: {n_choices} answers are announced, 'Answer{number}: ' is missing")
        texts.append(text.strip())
    texts.append(rest.strip())
    gold = int(item["answer"].removeprefix("answer")) - 1
    if not 0 <= gold < n_choices:
        raise EvalError(f"{path}: {row_id}: answer {item['answer']!r} is none of {names}")
    labels = [chr(ord("A") + i) for i in range(n_choices)]
    return {
        "id": row_id,
        "question": question.strip(),
        "choices": {"text": texts, "label": labels},
        "answerKey": labels[gold],
    }


def _read_gsm8k(folder: Path) -> Configs:
    return {"main": {split: _load_jsonl(folder / f"{split}.jsonl") for split in ("train", "test")}}


_SENTENCE_END = re.compile(r"[.!?]\s+")


def split_context(context: str) -> tuple[str, str]:
    """HellaSwag's ctx -> (ctx_a, ctx_b): the unfinished last sentence is ctx_b."""
    if context.endswith((".", "!", "?", ",", ")", '"', "'")):
        return context, ""
    ends = list(_SENTENCE_END.finditer(context))
    if not ends:
        return "", context
    return context[: ends[-1].start() + 1], context[ends[-1].end() :]


def _read_hellaswag(folder: Path) -> Configs:
    """Six lines an item: `activity_label: ctx`, label, four endings."""
    path = folder / "hellaswag_val_full.txt.bz2"
    try:
        lines = bz2.decompress(path.read_bytes()).decode().splitlines()
    except (OSError, ValueError) as error:
        raise EvalError(f"{path}: not bzip2 of UTF-8 text: {error}") from None
    if len(lines) % 6:
        raise EvalError(f"{path}: {len(lines)} lines, expected a multiple of 6: the file is cut")
    rows = []
    for i in range(0, len(lines), 6):
        activity, _, context = lines[i].partition(": ")
        ctx_a, ctx_b = split_context(context)
        rows.append(
            {
                "ind": i // 6,
                "activity_label": activity,
                "ctx_a": ctx_a,
                "ctx_b": ctx_b,
                "ctx": context,
                "endings": lines[i + 2 : i + 6],
                "label": lines[i + 1].strip(),
            }
        )
    return {"default": {"validation": rows}}


def _read_humaneval(folder: Path) -> Configs:
    path = folder / "HumanEval.jsonl.gz"
    try:
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    except (OSError, EOFError, ValueError) as error:
        raise EvalError(f"{path}: not gzip of UTF-8 text: {error}") from None
    return {"openai_humaneval": {"test": [_parse_json(line, f"{path}:{n}") for n, line in enumerate(lines, 1)]}}


def _read_mmlu(folder: Path) -> Configs:
    configs: Configs = {}
    for split in ("dev", "test"):
        for path in sorted((folder / split).glob(f"*_{split}.csv")):
            subject = path.name.removesuffix(f"_{split}.csv")
            configs.setdefault(subject, {})[split] = _mmlu_rows(path, subject)
    check_mmlu({subject: len(splits.get("test", [])) for subject, splits in configs.items()}, str(folder))
    lacking = sorted(subject for subject, splits in configs.items() if len(splits.get("dev", [])) != 5)
    if lacking:
        raise EvalError(f"{folder}: not 5 dev rows for {', '.join(lacking)}; few-shot prompts need them")
    return configs


def check_mmlu(test_rows: dict[str, int], where: str) -> None:
    """MMLU is one score over all subjects, or none.

    Raises:
        EvalError: not 57 subjects with 14,042 test rows together.
    """
    total = sum(test_rows.values())
    if len(test_rows) != MMLU_SUBJECTS or total != MMLU_TEST_ROWS:
        raise EvalError(
            f"{where}: {len(test_rows)} MMLU subjects with {total} test rows, expected {MMLU_SUBJECTS} and "
            f"{MMLU_TEST_ROWS}: an average over a part is not an MMLU score"
        )


def _mmlu_rows(path: Path, subject: str) -> Rows:
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
        return [
            {
                "question": row["question"],
                "subject": subject,
                "choices": [row[f"choice{i}"] for i in range(4)],
                "answer": int(row["answer"]),
            }
            for row in rows
        ]
    except (OSError, UnicodeDecodeError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise EvalError(
            f"{path}: not a CSV file with the header question,choice0,choice1,choice2,choice3,answer: {error}"
        ) from None


def _read_truthfulqa(folder: Path) -> Configs:
    rows = [
        {
            "question": item["question"],
            **{
                name: {"choices": list(item[name]), "labels": list(item[name].values())}
                for name in ("mc1_targets", "mc2_targets")
            },
        }
        for item in _load_json(folder / "data_mc_task.json")
    ]
    return {"multiple_choice": {"validation": rows}}


def _read_truthfulqa_generation(folder: Path) -> Configs:
    """The rows that the hub's loader makes of the authors' CSV: lists of answers are cut at semicolons."""
    path = folder / "TruthfulQA.csv"
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = [
            {
                "type": row["Type"],
                "category": row["Category"],
                "question": row["Question"],
                "best_answer": row["Best Answer"],
                "correct_answers": [answer.strip() for answer in row["Correct Answers"].strip().split(";")],
                "incorrect_answers": [answer.strip() for answer in row["Incorrect Answers"].strip().split(";")],
                "source": row["Source"],
            }
            for row in csv.DictReader(io.StringIO(text, newline=""))
        ]
    except (OSError, UnicodeDecodeError, KeyError, AttributeError, csv.Error) as error:
        raise EvalError(
            f"{path}: not a CSV file with the header Type,Category,Question,Best Answer,Correct Answers,"
            f"Incorrect Answers,Source: {type(error).__name__} {error}"
        ) from None
    return {"generation": {"validation": rows}}


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvalError(f"{path}: cannot be read as JSON: {error}") from None


def _load_jsonl(path: Path) -> Rows:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(f"{path}: cannot be read as text: {error}") from None
    return [_parse_json(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _parse_json(line: str, where: str) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise EvalError(f"{where}: not JSON: {error}") from None
    return row


_ARC_ORIGIN = "github.com/AGI-Edgerunners/LLM-Adapters dataset/ (CC BY-SA 4.0)"

BENCHMARKS: dict[str, Benchmark] = {
    "arc_easy": Benchmark(
        name="arc_easy",
        folder="arc",
        files=("llm_adapters_ARC-Easy.train.json", "llm_adapters_ARC-Easy.test.json"),
        hub_id="allenai/ai2_arc",
        rows={"train": 2251, "test": 2376},
        read=_read_arc("ARC-Easy"),
        sha256={
            "llm_adapters_ARC-Easy.train.json": "6a06cece3dec32f4fb1c1b0fc29dab14be7cf3053b417290dbc6cd845359f5ff",
            "llm_adapters_ARC-Easy.test.json": "3f32a84716ca6d57d38728bf80cc8117aecd17445c2cf29a68b571b810eb82dc",
        },
        absent_splits=("validation",),
        origin=_ARC_ORIGIN,
    ),
    "arc_challenge": Benchmark(
        name="arc_challenge",
        folder="arc",
        files=("llm_adapters_ARC-Challenge.train.json", "llm_adapters_ARC-Challenge.test.json"),
        hub_id="allenai/ai2_arc",
        rows={"train": 1119, "test": 1172},
        read=_read_arc("ARC-Challenge"),
        sha256={
            "llm_adapters_ARC-Challenge.train.json": (
                "a9debff28aafed86a08211dc3584a3b6cb38edca8c56bb34cd5002ed54aeebfb"
            ),
            "llm_adapters_ARC-Challenge.test.json": "4a89ce368ae01a71d268d9851686738b2a0a1d84271116bab49a1dd2b48ecad7",
        },
        absent_splits=("validation",),
        origin=_ARC_ORIGIN,
    ),
    "hellaswag": Benchmark(
        name="hellaswag",
        folder="hellaswag",
        files=("hellaswag_val_full.txt.bz2",),
        hub_id="Rowan/hellaswag",
        rows={"validation": 10042},
        read=_read_hellaswag,
        sha256={"hellaswag_val_full.txt.bz2": "50b637899e4263c2bc456c2dc726c95d2c8cd8e2a552ea5bd7719ce3cb03fe5b"},
        absent_splits=("train",),
        origin="github.com/klosax/hellaswag_text_data (data MIT)",
    ),
    "mmlu": Benchmark(
        name="mmlu",
        folder="mmlu",
        files=("dev/*_dev.csv", "test/*_test.csv"),
        hub_id="cais/mmlu",
        rows={"dev": 285, "test": MMLU_TEST_ROWS},
        read=_read_mmlu,
        sha256={"*": "705a31481e86fd8c97f4b0213536660232da07eefd87baa62cdb83cadc746cc2"},
        absent_splits=("validation", "auxiliary_train"),
        origin="github.com/hendrycks/test (MIT) as <split>/<subject>_<split>.csv with a header",
    ),
    "gsm8k": Benchmark(
        name="gsm8k",
        folder="gsm8k",
        files=("train.jsonl", "test.jsonl"),
        hub_id="openai/gsm8k",
        rows={"train": 7473, "test": 1319},
        read=_read_gsm8k,
        sha256={
            "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
            "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        },
        origin="github.com/openai/grade-school-math (MIT)",
    ),
    "truthfulqa": Benchmark(
        name="truthfulqa",
        folder="truthfulqa",
        files=("data_mc_task.json",),
        hub_id="truthfulqa/truthful_qa",
        rows={"validation": 817},
        read=_read_truthfulqa,
        sha256={"data_mc_task.json": "b3799639bc76c939836d587de7d30b48d91012cb34be04806d33106ce06c162a"},
        origin="github.com/sylinrl/TruthfulQA data/mc_task.json (Apache-2.0)",
    ),
    "truthfulqa_gen": Benchmark(
        name="truthfulqa_gen",
        folder="truthfulqa",
        files=("TruthfulQA.csv",),
        hub_id="truthfulqa/truthful_qa",
        rows={"validation": 817},
        read=_read_truthfulqa_generation,
        sha256={"TruthfulQA.csv": "f9bd9e859cc102cb1f647f1064da7e009be752c416845cf9fa56e6eaae403a7d"},
        origin="github.com/sylinrl/TruthfulQA TruthfulQA.csv (Apache-2.0)",
    ),
    "humaneval": Benchmark(
        name="humaneval",
        folder="humaneval",
        files=("HumanEval.jsonl.gz",),
        hub_id="openai/openai_humaneval",
        rows={"test": 164},
        read=_read_humaneval,
        sha256={"HumanEval.jsonl.gz": "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"},
        origin="github.com/openai/human-eval (MIT)",
    ),
}
