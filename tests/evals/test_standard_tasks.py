"""Tasks of lm-eval by name over hub-shaped folders, the suites, and data sets that come from the hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from evals import task_loader
from evals.benchmarks import OFFICIAL_DOCUMENTS
from evals.data import doctor, prepare, write_dataset
from evals.hub import prepare_from_hub
from evals.humaneval import load_problems
from evals.scoring import score_task
from evals.suites import Suite, resolve_tasks
from evals.task_loader import TaskUnavailableError, data_sets, load_task, plan_from_folders, plan_task
from megagpt.cli import main
from megagpt.config.load import load_config
from megagpt.errors import EvalError
from tests.evals.conftest import SHARED
from tests.evals.fixtures import gsm8k_rows

SUITES = Path(__file__).resolve().parents[2] / "configs" / "evals"
with_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here")
NAMES = ("Anna", "Ben", "Cora", "Dan")


def rows_of(task: str) -> tuple[str, str, str, list[dict[str, Any]]]:
    """Hub id, config, scored split, and four rows of our own."""
    numbers = range(4)
    return {
        "piqa": (
            "baber/piqa",
            "default",
            "validation",
            [{"goal": f"Open box {n}", "sol1": "lift the lid", "sol2": "eat the lid", "label": n % 2} for n in numbers],
        ),
        "winogrande": (
            "allenai/winogrande",
            "winogrande_xl",
            "validation",
            [
                {
                    "sentence": f"{x} lent Eve the {n} cups, so _ was thanked.",
                    "option1": x,
                    "option2": "Eve",
                    "answer": "1",
                }
                for n, x in enumerate(NAMES)
            ],
        ),
        "lambada_openai": (
            "EleutherAI/lambada_openai",
            "default",
            "test",
            [{"text": f"{x} has a dog. The dog belongs to {x}"} for x in NAMES],
        ),
        "boolq": (
            "aps/super_glue",
            "boolq",
            "validation",
            [
                {"passage": f"{x} is old.", "question": f"is {x} old", "label": n % 2, "idx": n}
                for n, x in enumerate(NAMES)
            ],
        ),
        "openbookqa": (
            "allenai/openbookqa",
            "main",
            "test",
            [
                {
                    "id": str(n),
                    "question_stem": f"{x} is cold and puts on",
                    "choices": {"text": ["a coat", "a lake", "noon", "two"], "label": list("ABCD")},
                    "answerKey": "A",
                }
                for n, x in enumerate(NAMES)
            ],
        ),
        "truthfulqa_gen": (
            "truthfulqa/truthful_qa",
            "generation",
            "validation",
            [
                {
                    "type": "A",
                    "category": "c",
                    "question": f"Is {x} a stone?",
                    "best_answer": "No",
                    "correct_answers": ["No", "A person"],
                    "incorrect_answers": ["Yes"],
                    "source": "",
                }
                for x in NAMES
            ],
        ),
    }[task]


EXPECTED = {
    "piqa": {"acc", "acc_norm"},
    "winogrande": {"acc"},
    "lambada_openai": {"perplexity", "acc"},
    "boolq": {"acc"},
    "openbookqa": {"acc", "acc_norm"},
    "truthfulqa_gen": {
        f"{name}_{how}" for name in ("bleu", "rouge1", "rouge2", "rougeL") for how in ("max", "acc", "diff")
    },
}


def write_task(out: Path, task: str) -> Path:
    hub_id, config, split, rows = rows_of(task)
    write_dataset(out, hub_id, {config: {split: rows}})
    return out / hub_id


@pytest.mark.parametrize(
    "task", [*sorted(set(EXPECTED) - {"truthfulqa_gen"}), pytest.param("truthfulqa_gen", marks=pytest.mark.exhaustive)]
)
def test_a_task_runs_by_name_over_a_hub_shaped_folder(task: str, lm, tmp_path: Path) -> None:
    folder = write_task(tmp_path / "hub", task)
    if task == "truthfulqa_gen":
        lm.max_length = 10_000  # its prompt is long; positions beyond the model's context are not reached
        lm.generate_until = lambda requests: ["No." for _ in requests]  # what is scored is the subject here
    plan = plan_from_folders(task, {rows_of(task)[0]: folder}, tmp_path / "cache")
    scores = score_task(lm, load_task(plan, check_counts=False), None)
    assert scores.n == 4
    assert set(scores.metrics) == EXPECTED[task]
    if task == "truthfulqa_gen":
        assert scores.metrics["rouge1_acc"].value == 1
    with pytest.raises(
        TaskUnavailableError, match=f"{task} has 4 documents, the official one has {OFFICIAL_DOCUMENTS[task]}"
    ):
        load_task(plan)


def test_a_package_that_a_definition_needs_and_that_is_missing_is_named(monkeypatch, tmp_path: Path) -> None:
    """TruthfulQA's texts are compared by sacrebleu and rouge_score."""
    folder = write_task(tmp_path / "hub", "truthfulqa_gen")
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.truthfulqa.utils", raising=False)
    monkeypatch.setitem(sys.modules, "rouge_score", None)  # as if it were not installed
    plan = plan_from_folders("truthfulqa_gen", {"truthfulqa/truthful_qa": folder}, tmp_path / "cache")
    with pytest.raises(TaskUnavailableError, match=r"needs the Python package rouge_score.*pip install rouge-score"):
        load_task(plan, check_counts=False)


def test_few_shots_without_a_train_split_come_from_the_scored_one_without_the_scored_document(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "hub", "winogrande")
    plan = plan_from_folders("winogrande", {"allenai/winogrande": folder}, tmp_path / "cache")
    assert plan.data.absent_splits == ("train",)
    task = load_task(plan, 2, check_counts=False).tasks["winogrande"]
    task.build_all_requests(rank=0, world_size=1)
    for instance in task.instances:
        shots, _, scored = instance.args[0].rpartition("\n\n")
        name = instance.doc["option1"]
        assert shots.count("lent") == 2
        assert f"{name} lent" not in shots
        assert "lent" in scored


@pytest.mark.parametrize("file", sorted(SUITES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_suite_names_tasks_that_there_are(file: Path) -> None:
    names = [task.task for task in load_config(Suite, [file]).tasks]
    assert data_sets(tuple(name for name in names if name != "heldout"))
    assert len(set(names)) == len(names)


def test_the_leaderboards_shots_are_the_published_ones() -> None:
    tasks = {task.task: (task.shots, task.limit) for task in resolve_tasks(("leaderboard_v1",), SUITES)}
    assert tasks == {
        "arc_challenge": (25, None),
        "hellaswag": (10, None),
        "mmlu": (5, None),
        "truthfulqa_mc2": (0, None),
        "winogrande": (5, None),
        "gsm8k": (5, None),
    }


def test_core_and_full_hold_every_benchmark_that_is_prepared() -> None:
    core, full = ({task.task for task in resolve_tasks((name,), SUITES)} for name in ("core", "full"))
    assert {"arc_easy", "arc_challenge", "hellaswag", "mmlu", "gsm8k", "truthfulqa_mc2", "humaneval"} <= core <= full
    assert {*OFFICIAL_DOCUMENTS, "mmlu", "humaneval"} <= full


def humaneval_rows(n: int) -> list[dict[str, str]]:
    names = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
    return [{name: f"{name} {number}" for name in names} for number in range(n)]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch) -> Path:
    """A folder in which `datasets` finds a data set of the hub's name, as it does in the working directory."""
    folder = tmp_path / "stand_in"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(task_loader.hub_constants, "is_offline_mode", lambda: True)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    return folder


def test_data_sets_are_prepared_from_the_hub_and_read_back(stand_in: Path, tmp_path: Path, lm) -> None:
    write_dataset(stand_in, "openai/openai_humaneval", {"openai_humaneval": {"test": humaneval_rows(164)}})
    write_dataset(stand_in, "openai/gsm8k", {"main": {split: gsm8k_rows() for split in ("train", "test")}})
    write_task(stand_in, "piqa")
    out, told = tmp_path / "out", []
    report = prepare_from_hub(("humaneval", "gsm8k", "piqa"), out, lambda *at: told.append(at))
    statuses = {name: found.status for name, found in report.benchmarks.items() if found.status != "missing"}
    assert statuses == {"humaneval": "ok", "gsm8k": "refused"}
    assert "8 train rows, expected 7473, 8 test rows, expected 1319" in report.benchmarks["gsm8k"].reason
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert not (out / "openai" / "gsm8k").exists()
    rows = (out / "openai/openai_humaneval/default/test.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == humaneval_rows(164)
    problems, data = load_problems(out, tmp_path / "cache")
    assert (problems[163].task_id, data.origin, len(problems)) == ("task_id 163", "local", 164)
    plan = plan_task("piqa", out, tmp_path / "cache")
    assert plan.data.origin == "local"
    assert len(load_task(plan, check_counts=False).tasks["piqa"].eval_docs) == 4
    shown = doctor(out)
    assert "baber/piqa: default/validation.jsonl; sha256" in shown
    (out / "openai/openai_humaneval/default/test.jsonl").write_text("{}\n")
    assert "is missing or not what was written" in " ".join(doctor(out).replace("│", " ").split())


def test_a_hub_that_is_not_reached_is_told_and_nothing_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(task_loader.hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(EvalError, match=r"the hub cannot be reached \(http://127\.0\.0\.1:9: "):
        prepare_from_hub(("gsm8k",), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_data_set_that_the_hub_has_not_is_named(stand_in: Path, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="openai/gsm8k main: cannot be loaded from the hub"):
        prepare_from_hub(("gsm8k",), tmp_path / "out")


def test_doctor_tells_of_the_sandbox_without_any_data() -> None:
    found = CliRunner().invoke(main, ["eval", "doctor"])
    assert found.exit_code == 0
    assert found.output.startswith("sandbox: ")


def test_the_csv_of_truthfulqa_becomes_the_hubs_rows(tmp_path: Path) -> None:
    from evals.benchmarks import BENCHMARKS

    folder = tmp_path / "truthfulqa"
    folder.mkdir()
    head = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
    (folder / "TruthfulQA.csv").write_text(f'\ufeff{head}A,C,"Why, so?",No,No; Never ,Yes,http://x\n', encoding="utf-8")
    (row,) = BENCHMARKS["truthfulqa_gen"].read(folder)["generation"]["validation"]
    assert row == {
        "type": "A",
        "category": "C",
        "question": "Why, so?",
        "best_answer": "No",
        "correct_answers": ["No", "Never"],
        "incorrect_answers": ["Yes"],
        "source": "http://x",
    }
    (folder / "TruthfulQA.csv").write_text("a,b\n1,2\n")
    with pytest.raises(EvalError, match=r"TruthfulQA\.csv: not a CSV file with the header Type,"):
        BENCHMARKS["truthfulqa_gen"].read(folder)


@with_shared
@pytest.mark.exhaustive
def test_the_real_benchmarks_load_with_their_official_numbers(tmp_path: Path) -> None:
    prepare(SHARED, tmp_path / "out")
    assert (tmp_path / "out" / "mt_bench" / "question.jsonl").is_file()
    for task in ("arc_challenge", "truthfulqa_mc1", "truthfulqa_mc2", "truthfulqa_gen"):
        loaded = load_task(plan_task(task, tmp_path / "out", tmp_path / "cache"))
        assert len(loaded.tasks[task].eval_docs) == OFFICIAL_DOCUMENTS[task]
