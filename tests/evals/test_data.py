"""Benchmark files -> hub-shaped folders: mappings, counts, hashes, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evals.benchmarks import BENCHMARKS, _arc_row, check_mmlu, split_context
from evals.data import data_hash, doctor, locate, prepare, write_dataset
from evals.task_loader import LM_EVAL_TASKS, TaskUnavailableError, load_task, plan_from_folders, plan_task
from megagpt.errors import EvalError
from tests.evals.fixtures import gsm8k_rows, write_all

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "evals"
with_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no benchmark files in shared/data/evals")


def arc_item(answer: str = "answer2") -> dict[str, str]:
    question = "Please choose the correct answer to the question: What is ice?"
    choices = "Answer1: fire Answer2: water Answer3: a stone"
    return {"instruction": f"{question}\n\n{choices}\n\nAnswer format: answer1/answer2/answer3", "answer": answer}


def test_an_arc_item_becomes_the_hubs_row() -> None:
    row = _arc_row(arc_item(), "id", Path("file"))
    assert row == {
        "id": "id",
        "question": "What is ice?",
        "choices": {"text": ["fire", "water", "a stone"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    }


def test_an_arc_answer_that_is_no_choice_is_an_error() -> None:
    with pytest.raises(EvalError, match="answer 'answer4' is none of answer1/answer2/answer3"):
        _arc_row(arc_item("answer4"), "id", Path("file"))


@pytest.mark.parametrize(
    ("context", "parts"),
    [
        ("A man is on a roof. he", ("A man is on a roof.", "he")),
        ("He sits down. She stands.", ("He sits down. She stands.", "")),
        ("the dog runs", ("", "the dog runs")),
        ("One! Two? three", ("One! Two?", "three")),
    ],
)
def test_a_hellaswag_context_is_cut_before_its_unfinished_sentence(context: str, parts: tuple[str, str]) -> None:
    assert split_context(context) == parts


def test_a_part_of_a_benchmark_is_refused_and_nothing_is_written_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "raw" / "gsm8k"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in gsm8k_rows()))
    with pytest.raises(EvalError, match=r"8 train rows, 8 test rows, expected 7473 train rows, 1319 test rows"):
        prepare(tmp_path / "raw", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    table = doctor(tmp_path / "raw")
    assert "refused" in table
    assert "differs" in table
    with pytest.raises(TaskUnavailableError, match="8 train rows"):
        plan_task("gsm8k", tmp_path / "raw", tmp_path / "cache")


def test_mmlu_with_a_subject_less_is_refused() -> None:
    with pytest.raises(EvalError, match="56 MMLU subjects with 56 test rows, expected 57 and 14042"):
        check_mmlu({str(i): 1 for i in range(56)}, "here")


def test_a_hub_shaped_folder_with_too_few_documents_is_refused_for_scores(tmp_path: Path) -> None:
    write_all(tmp_path / "hub")
    plan = plan_task("arc_easy", tmp_path / "hub", tmp_path / "cache")
    assert plan.data.origin == "local"
    with pytest.raises(TaskUnavailableError, match="8 documents, the official one has 2376"):
        load_task(plan)


def test_splits_that_the_data_lacks_are_declared_null_and_never_filled(tmp_path: Path) -> None:
    folders = write_all(tmp_path / "hub")
    plan = plan_from_folders("hellaswag", {"Rowan/hellaswag": folders["hellaswag"]}, tmp_path / "cache")
    assert plan.data.absent_splits == ("train",)
    task = load_task(plan, check_counts=False).tasks["hellaswag"]
    assert task.config.training_split is None
    assert task.config.validation_split == "validation"


def test_a_missing_few_shot_split_makes_the_task_unavailable(tmp_path: Path) -> None:
    write_dataset(tmp_path, "openai/gsm8k", {"main": {"test": gsm8k_rows()}})
    with pytest.raises(TaskUnavailableError, match="gsm8k needs the split train"):
        plan_from_folders("gsm8k", {"openai/gsm8k": tmp_path / "openai" / "gsm8k"}, tmp_path / "cache")


def test_the_identity_of_data_changes_with_one_row(tmp_path: Path) -> None:
    rows = gsm8k_rows()
    write_dataset(tmp_path / "a", "o/n", {"main": {"test": rows}})
    write_dataset(tmp_path / "b", "o/n", {"main": {"test": rows}})
    write_dataset(tmp_path / "c", "o/n", {"main": {"test": rows[:-1]}})
    a, b, c = (data_hash(tmp_path / name / "o" / "n", {"main"}) for name in "abc")
    assert a == b != c


def test_a_data_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="no such folder of benchmark data"):
        locate("openai/gsm8k", tmp_path / "nowhere", tmp_path)


def test_a_misspelt_task_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"there is no task 'arc_eazy'.*did you mean"):
        plan_task("arc_eazy", None, tmp_path)


def test_a_task_that_runs_generated_code_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(TaskUnavailableError, match="runs code that the model wrote"):
        plan_task("humaneval", None, tmp_path)


def test_the_mmlu_group_has_the_57_subjects_of_lm_evals_own_folder(tmp_path: Path) -> None:
    plan = plan_task("mmlu", None, tmp_path)
    defined = {path.stem for path in (LM_EVAL_TASKS / "mmlu" / "default").glob("mmlu_*.yaml")}
    assert set(plan.definitions) == defined
    assert len(defined) == 57


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    prepare(SHARED, out)
    return out


@with_shared
def test_the_known_files_have_the_official_counts_and_hashes(prepared: Path) -> None:
    record = json.loads((prepared / "prepared.json").read_text())["benchmarks"]
    assert {name: found["rows"] for name, found in record.items()} == {n: b.rows for n, b in BENCHMARKS.items()}
    assert {found["checksum"] for found in record.values()} == {"known"}


@with_shared
@pytest.mark.parametrize(("task", "n"), [("arc_easy", 2376), ("hellaswag", 10042), ("gsm8k", 1319), ("mmlu", 14042)])
def test_real_tasks_have_their_official_number_of_documents(prepared: Path, tmp_path: Path, task: str, n: int) -> None:
    loaded = load_task(plan_task(task, prepared, tmp_path))
    assert sum(len(found.eval_docs) for found in loaded.tasks.values()) == n
    assert len(loaded.tasks) == (57 if task == "mmlu" else 1)


@with_shared
def test_a_prepared_file_that_was_changed_is_refused(prepared: Path, tmp_path: Path) -> None:
    path = prepared / "openai" / "gsm8k" / "main" / "test.jsonl"
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-10])
        with pytest.raises(TaskUnavailableError, match=r"test\.jsonl is missing or not what was written"):
            plan_task("gsm8k", prepared, tmp_path)
    finally:
        path.write_bytes(content)
