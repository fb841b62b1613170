"""`megagpt eval items`: the documents of tasks as texts that must not stand in training data.

One line a document: `task`, the leaf task's name, `id`, the document's number as `doc_id` of the samples files has it,
and `texts`: the prompt without examples followed by the right answer, and the question by itself; of MT-Bench the
turns, with and without their reference answers. The data pipeline's `decontamination.items` reads such files.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task

from evals.humaneval import HUMANEVAL, item_rows
from evals.mt_bench.items import MT_BENCH, question_items
from evals.prompts import kept_templates
from evals.scoring import quiet_bars
from evals.suites import resolve_tasks
from evals.task_loader import DataOrigin, TaskUnavailableError, load_task, plan_task
from megagpt.atomic import write_file
from megagpt.errors import EvalError


def write_items(names: tuple[str, ...], data_dir: Path | None, out: Path, suites_dir: Path) -> str:
    """Write the documents of all tasks to one file.

    Args:
        names: tasks, groups, tags, suites, and `mt_bench`; `heldout` of a suite has no documents and is passed over.
        data_dir: local benchmark data; what is not there comes from the hub.
        out: jsonl file to write.
        suites_dir: where suites lie.

    Returns:
        what was written, for the user.

    Raises:
        EvalError: an unknown task, or tasks whose data cannot be reached (all of them named); nothing is written then.
    """
    items = collect_items(names, data_dir, suites_dir).items
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, b"".join(map(_line, items)))
    n_tasks = len({row["task"] for row in items})
    return f"{out}: {len(items)} items of {n_tasks} task{'' if n_tasks == 1 else 's'}"


@dataclass(frozen=True)
class Items:
    """The documents of tasks."""

    items: list[dict[str, Any]]
    """`task` (the leaf), `id`, `texts`; each document once."""
    data: dict[str, str]
    """Task or group that was asked for -> what identifies its rows: their hash, or where they come from."""
    leaves: dict[str, list[str]]
    """Task or group that was asked for -> its leaf tasks."""


def collect_items(names: tuple[str, ...], data_dir: Path | None, suites_dir: Path) -> Items:
    """The documents of all tasks; arguments and errors as of `write_items`."""
    tasks = [task.task for task in resolve_tasks(names, suites_dir) if task.task != "heldout"]
    found: dict[tuple[str, int], dict[str, Any]] = {}
    data: dict[str, str] = {}
    leaves: dict[str, list[str]] = {}
    problems = []
    with tempfile.TemporaryDirectory() as cache_dir, quiet_bars(), kept_templates():
        for name in tasks:
            try:
                rows, origin = _rows_of(name, data_dir, Path(cache_dir))
            except TaskUnavailableError as error:
                problems.append(f"{name}: {error}")
                continue
            data[name] = origin.sha256 or f"{origin.origin} {origin.path_or_id}"
            leaves[name] = list(rows)
            for leaf, documents in rows.items():
                found |= {(leaf, row["id"]): row for row in documents}
    if problems:
        raise EvalError("no items were written, because these tasks cannot be loaded:\n" + "\n".join(problems))
    return Items(list(found.values()), data, leaves)


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _rows_of(name: str, data_dir: Path | None, cache_dir: Path) -> tuple[dict[str, list[dict[str, Any]]], DataOrigin]:
    """Leaf tasks with their documents, and where these come from."""
    if name == HUMANEVAL:  # lm-eval's definition of it runs code when it is loaded
        rows, origin = item_rows(data_dir, cache_dir)
        return {name: rows}, origin
    if name == MT_BENCH:  # no task of lm-eval's: a judge rates its answers
        rows, origin = question_items(data_dir)
        return {name: rows}, origin
    loaded = load_task(plan_task(name, data_dir, cache_dir))
    return {leaf: list(_rows(leaf, task)) for leaf, task in loaded.tasks.items()}, loaded.data


def _rows(leaf: str, task: Task) -> Iterator[dict[str, Any]]:
    for number, doc in enumerate(task.eval_docs):
        yield {"task": leaf, "id": number, "texts": item_texts(task, doc)}


def item_texts(task: Task, doc: Mapping[str, Any]) -> list[str]:
    """The prompt with the right answer (each of them, where several are right), and the question by itself.

    Where the choices are letters (MMLU), a further text has the question and the choice that the letter stands for.

    Raises:
        EvalError: a definition that gives neither text nor choice.
    """
    query = task.doc_to_text(doc)
    target = task.doc_to_target(doc)
    choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == "multiple_choice" else []
    if isinstance(query, int):  # winogrande: the choices are whole prompts, and this is the right one's number
        query, choices = choices[query], []
    if not isinstance(query, str):
        raise EvalError(f"task {task.task_name}: its prompt is {type(query).__name__} and not text; not supported")
    question = _question(task, doc, query)
    texts = []
    for right in target if isinstance(target, list | tuple) else [target]:
        answer = choices[right] if isinstance(right, int) and choices else right
        texts.append(f"{query} {answer}".strip())
        spelled = doc.get("choices")
        if isinstance(right, int) and isinstance(spelled, list) and len(spelled) == len(choices) and spelled != choices:
            texts.append(f"{question} {spelled[right]}".strip())
    return [text for text in dict.fromkeys([*texts, question]) if text]


def _question(task: Task, doc: Mapping[str, Any], query: str) -> str:
    """What the document itself calls its question; else what lm-eval would look for; else the prompt."""
    named = doc.get("question")
    if isinstance(named, str):
        return named.strip()
    looked_for = task.doc_to_decontamination_query(doc) if task.should_decontaminate() else query
    return looked_for.strip() if isinstance(looked_for, str) else query.strip()
