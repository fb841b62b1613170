"""`megagpt eval items`: what must not stand in training data, from lm-eval's own definitions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from evals.items import item_texts, write_items
from evals.task_loader import load_task, plan_task
from megagpt.cli import main
from megagpt.errors import EvalError

SUITES = Path(__file__).resolve().parents[2] / "configs" / "evals"
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "evals"
with_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no benchmark files in shared/data/evals")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command_writes_every_document_under_the_number_that_results_have(tmp_path):
    out = tmp_path / "deep" / "items.jsonl"
    found = CliRunner().invoke(main, ["eval", "items", "--tasks", "megagpt_smoke", "--out", str(out)])
    assert found.exit_code == 0, found.output
    rows = read(out)
    assert f"{len(rows)} items of" in found.output
    tasks = load_task(plan_task("megagpt_smoke", None, tmp_path)).tasks
    expected = [(name, number) for name, task in tasks.items() for number, _ in task.doc_iterator()]
    assert [(row["task"], row["id"]) for row in rows] == expected
    for row in rows:
        task = tasks[row["task"]]
        doc = list(task.eval_docs)[row["id"]]
        assert any(task.doc_to_text(doc).strip() in text for text in row["texts"])


def test_tasks_that_cannot_be_loaded_are_all_named_and_nothing_is_written(tmp_path):
    with pytest.raises(EvalError, match="no items were written") as caught:
        write_items(("humaneval", "humaneval_plus", "megagpt_smoke"), None, tmp_path / "items.jsonl", SUITES)
    assert "humaneval: " in str(caught.value)
    assert "humaneval_plus: " in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Defined:
    """The part of lm-eval's Task that is asked, with a definition's answers."""

    task_name = "made_up"

    def __init__(self, text, target, choices=None, query=None):
        self.OUTPUT_TYPE = "multiple_choice" if choices is not None else "generate_until"
        self.doc_to_text = lambda _: text
        self.doc_to_target = lambda _: target
        self.doc_to_choice = lambda _: choices
        self.should_decontaminate = lambda: query is not None
        self.doc_to_decontamination_query = lambda _: query


@pytest.mark.parametrize(
    ("task", "doc", "texts"),
    [
        (Defined("Question: Why?\nAnswer:", "So."), {"question": "Why?"}, ["Question: Why?\nAnswer: So.", "Why?"]),
        (
            Defined("Why?\nA. x\nB. y\nAnswer:", 1, ["A", "B"]),
            {"question": " Why?", "choices": ["x", "y"]},
            ["Why?\nA. x\nB. y\nAnswer: B", "Why? y", "Why?"],
        ),
        (Defined("He sat", 0, ["down.", "up."]), {"choices": ["down.", "up."]}, ["He sat down.", "He sat"]),
        (Defined("Q:", ["yes", "aye"], query="Is it?"), {}, ["Q: yes", "Q: aye", "Is it?"]),
        (Defined("Q:", [0, 1], ["yes", "aye", "no"]), {}, ["Q: yes", "Q: aye", "Q:"]),
        (Defined(1, "fell.", ["The cat", "The dog"], "The _ fell."), {}, ["The dog fell.", "The _ fell."]),
        (Defined("", "A whole page."), {}, ["A whole page."]),
    ],
)
def test_texts_of_the_kinds_of_definitions(task, doc, texts):
    assert item_texts(task, doc) == texts


@with_shared
def test_real_tasks_give_question_and_right_answer(tmp_path):
    out = tmp_path / "items.jsonl"
    said = write_items(("arc_easy", "gsm8k"), SHARED, out, SUITES)
    assert "3695 items of 2 tasks" in said
    rows = {(row["task"], row["id"]): row["texts"] for row in read(out)}
    assert len(rows) == 2376 + 1319
    with_answer, question = rows["gsm8k", 0]
    assert question.startswith("Janet\u2019s ducks lay 16 eggs per day.")
    assert with_answer.startswith("Question: Janet\u2019s ducks")
    assert with_answer.endswith("#### 18")
    with_answer, question = rows["arc_easy", 0]
    assert with_answer.startswith(f"Question: {question}\nAnswer: ")
