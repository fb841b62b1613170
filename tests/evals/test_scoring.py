"""What a samples file says about single answers: lm-eval's own definitions over rows of ours, and a random model."""

from __future__ import annotations

import math

import pytest

from evals.gold import gold_scores
from evals.report_examples import examples
from evals.scoring import score_task
from evals.task_loader import load_task, plan_from_folders
from tests.evals.fixtures import FACTS, write_all


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


def score(lm, folders, tmp_path, task, shots=None, limit=None):
    hub_ids = {"truthfulqa": "truthfulqa/truthful_qa", "hellaswag": "Rowan/hellaswag", "arc": "allenai/ai2_arc"}
    plan = plan_from_folders(task, {hub_ids[task.split("_")[0]]: folders[task]}, tmp_path / "cache")
    return score_task(lm, load_task(plan, shots, check_counts=False), limit, bootstrap=0)


def test_truthfulqa_mc2_is_scored_by_all_right_choices_and_its_answers_are_neither_right_nor_wrong(
    lm, folders, tmp_path
):
    scores = score(lm, folders, tmp_path, "truthfulqa_mc2")
    assert [row["target"] for row in scores.samples] == [0] * len(FACTS)  # lm-eval's, which says nothing
    assert [row["right"] for row in scores.samples] == [sorted({g, (g + 1) % 4}) for _, _, g in FACTS]
    for row in scores.samples:
        weights = [math.exp(value) for value in row["logprobs"]]
        assert row["metrics"]["acc"] == pytest.approx(sum(weights[i] for i in row["right"]) / sum(weights))
        assert row["correct"] is None
    assert gold_scores(scores.samples) is None  # no one right answer, so no bits per byte and no margin
    assert scores.chance is None


def test_the_best_and_the_worst_answers_of_truthfulqa_mc2_are_told_by_score_with_the_documents_own_labels(
    lm, folders, tmp_path
):
    rows = score(lm, folders, tmp_path, "truthfulqa_mc2").samples
    by_score = sorted(rows, key=lambda row: -row["metrics"]["acc"])
    found = examples(10, "truthfulqa_mc2", rows)
    assert [e.document for e in found] == [str(by_score[i]["doc_id"]) for i in (0, 1, -1, -2)]
    assert [e.score for e in found] == [by_score[i]["metrics"]["acc"] for i in (0, 1, -1, -2)]
    assert all(e.is_right is None and e.margin is None for e in found)
    for example in found:
        right = rows[int(example.document)]["right"]
        assert [i for i, choice in enumerate(example.choices) if choice.is_right] == right


def test_truthfulqa_mc1_of_the_same_rows_is_right_or_wrong(lm, folders, tmp_path):
    scores = score(lm, folders, tmp_path, "truthfulqa_mc1")
    assert [row["correct"] for row in scores.samples] == [bool(row["metrics"]["acc"]) for row in scores.samples]
    assert not any("right" in row for row in scores.samples)
    assert gold_scores(scores.samples).n == len(FACTS)


def test_where_worked_examples_came_from_is_kept(lm, folders, tmp_path):
    """The hub's HellaSwag has a train split; ours has only the one that is scored, and lm-eval draws from it."""
    assert score(lm, folders, tmp_path, "hellaswag", 2, 2).splits == {
        "scored": ["validation"],
        "examples": ["validation"],
    }
    assert score(lm, folders, tmp_path, "arc_easy", 2, 2).splits == {"scored": ["test"], "examples": ["train"]}
    assert score(lm, folders, tmp_path, "arc_easy", 0, 2).splits == {"scored": ["test"]}
