"""Data sets that come from the hub, call by call; the hub is a folder in which `datasets` finds them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from evals.benchmarks import MMLU_SUBJECTS
from evals.data import doctor, prepare, write_dataset
from evals.hub import prepare_from_hub
from evals.task_loader import TaskUnavailableError, load_task, plan_task
from megagpt.cli import main
from megagpt.errors import EvalError
from tests.evals.fixtures import gsm8k_rows
from tests.evals.test_standard_tasks import humaneval_rows, stand_in, write_task  # noqa: F401 - a fixture

ARC = "allenai/ai2_arc"


def arc_rows(n: int) -> list[dict[str, Any]]:
    choices = {"text": ["hot", "cold"], "label": ["A", "B"]}
    return [{"id": str(i), "question": f"What is {i}?", "choices": choices, "answerKey": "A"} for i in range(n)]


def put_arc(folder: Path) -> None:
    sizes = {"ARC-Easy": (2251, 2376), "ARC-Challenge": (1119, 1172)}
    splits = {name: {"train": arc_rows(n), "test": arc_rows(m)} for name, (n, m) in sizes.items()}
    write_dataset(folder, ARC, splits)


def statuses(report_of: Path) -> dict[str, str]:
    benchmarks = json.loads((report_of / "prepared.json").read_text())["benchmarks"]
    return {name: found["status"] for name, found in benchmarks.items() if found["status"] != "missing"}


def said(folder: Path) -> str:
    return " ".join(doctor(folder).replace("│", " ").split())


def test_a_second_call_adds_to_the_first(stand_in: Path, tmp_path: Path) -> None:  # noqa: F811
    put_arc(stand_in)
    write_task(stand_in, "piqa")
    write_dataset(stand_in, "openai/openai_humaneval", {"openai_humaneval": {"test": humaneval_rows(164)}})
    out = tmp_path / "out"
    prepare_from_hub(("arc_easy", "piqa"), out)
    report = prepare_from_hub(("arc_challenge", "humaneval"), out)
    assert statuses(out) == dict.fromkeys(("arc_easy", "arc_challenge", "humaneval"), "ok")
    assert report.benchmarks["arc_easy"].status == "ok"
    for task, n in (("arc_easy", 2376), ("arc_challenge", 1172)):  # one card names both
        assert len(load_task(plan_task(task, out, tmp_path / "cache")).tasks[task].eval_docs) == n
    assert "as it was written" in said(out)
    (out / ARC / "ARC-Easy" / "test.jsonl").write_text("{}\n")  # of the first call
    assert "ARC-Easy/test.jsonl is missing or not what was written" in said(out)
    with pytest.raises(TaskUnavailableError, match=r"ARC-Easy/test\.jsonl is missing or not what was written"):
        plan_task("arc_easy", out, tmp_path / "cache")


def test_what_was_written_before_an_error_is_recorded(stand_in: Path, tmp_path: Path) -> None:  # noqa: F811
    put_arc(stand_in)
    with pytest.raises(EvalError, match="openai/gsm8k main: cannot be loaded from the hub"):
        prepare_from_hub(("arc_easy", "gsm8k", "arc_challenge"), tmp_path / "out")
    # Both configs of the data set are one unit.
    assert statuses(tmp_path / "out") == {"arc_easy": "ok", "arc_challenge": "ok"}


def test_damage_of_data_sets_without_official_hashes_is_seen(stand_in: Path, tmp_path: Path) -> None:  # noqa: F811
    write_task(stand_in, "piqa")
    out = tmp_path / "out"
    prepare_from_hub(("piqa",), out)
    assert plan_task("piqa", out, tmp_path / "cache").data.origin == "local"
    file = out / "baber/piqa/default/validation.jsonl"
    file.write_bytes(file.read_bytes()[:-3])
    assert "REFUSED" in said(out)
    with pytest.raises(TaskUnavailableError, match=r"validation\.jsonl is missing or not what was written"):
        plan_task("piqa", out, tmp_path / "cache")
    shutil.rmtree(out / "baber")
    assert "baber/piqa: REFUSED" in said(out)
    prepare_from_hub(("piqa",), out)
    assert "REFUSED" not in said(out)


def test_a_worse_copy_does_not_replace_a_whole_one(stand_in: Path, tmp_path: Path) -> None:  # noqa: F811
    put_arc(stand_in)
    out = tmp_path / "out"
    prepare_from_hub(("arc_easy",), out)
    shutil.rmtree(stand_in / "allenai")
    write_dataset(stand_in, ARC, {"ARC-Easy": {"train": arc_rows(2), "test": arc_rows(2)}})
    report = prepare_from_hub(("arc_easy",), out)
    assert "2 test rows, expected 2376" in report.benchmarks["arc_easy"].reason
    assert statuses(out) == {"arc_easy": "ok"}
    assert len(load_task(plan_task("arc_easy", out, tmp_path / "cache")).tasks["arc_easy"].eval_docs) == 2376


def test_files_prepared_beside_what_came_from_the_hub_leave_it(stand_in: Path, tmp_path: Path) -> None:  # noqa: F811
    put_arc(stand_in)
    write_task(stand_in, "piqa")
    out, source = tmp_path / "out", tmp_path / "source" / "gsm8k"
    prepare_from_hub(("arc_easy", "piqa"), out)
    source.mkdir(parents=True)
    for name, n in (("train", 7473), ("test", 1319)):
        (source / f"{name}.jsonl").write_text(f"{json.dumps(gsm8k_rows()[0])}\n" * n)
    prepare(source.parent, out)
    assert statuses(out) == {"arc_easy": "ok", "gsm8k": "ok"}
    assert "baber/piqa" in json.loads((out / "prepared.json").read_text())["others"]


def test_a_record_of_before_hashes_of_other_data_sets_is_read(stand_in: Path, tmp_path: Path) -> None:  # noqa: F811
    write_task(stand_in, "piqa")
    out = tmp_path / "out"
    prepare_from_hub(("piqa",), out)
    content = json.loads((out / "prepared.json").read_text())
    del content["others"]
    (out / "prepared.json").write_text(json.dumps(content))
    assert plan_task("piqa", out, tmp_path / "cache").data.origin == "local"
    (out / "prepared.json").write_text("{")
    with pytest.raises(EvalError, match="delete it and prepare the folder again"):
        prepare_from_hub(("piqa",), out)


def test_a_part_of_a_benchmark_is_refused_from_the_hub_as_well(stand_in: Path, tmp_path: Path) -> None:  # noqa: F811
    write_task(stand_in, "lambada_openai")
    plan = plan_task("lambada_openai", None, tmp_path / "cache")
    assert plan.data.origin == "hub"
    with pytest.raises(TaskUnavailableError, match="lambada_openai has 4 documents, the official one has 5153"):
        load_task(plan)


@pytest.mark.exhaustive
def test_a_part_of_mmlu_is_refused_from_the_hub_as_well(stand_in: Path, tmp_path: Path) -> None:  # noqa: F811
    from evals.task_loader import data_sets

    (subjects,) = data_sets(("mmlu",)).values()
    assert len(subjects) == MMLU_SUBJECTS
    row = {"question": "What?", "subject": "x", "choices": ["1", "2", "3", "4"], "answer": 0}
    write_dataset(stand_in, "cais/mmlu", {name: {"dev": [row] * 5, "test": [row] * 2} for name in subjects})
    with pytest.raises(TaskUnavailableError, match="57 MMLU subjects with 114 test rows, expected 57 and 14042"):
        load_task(plan_task("mmlu", None, tmp_path / "cache"))


def test_the_command_says_what_the_folder_holds_after_both_calls(stand_in: Path, tmp_path: Path) -> None:  # noqa: F811
    put_arc(stand_in)
    for task in ("arc_easy", "arc_challenge"):
        words = ["eval", "prepare", "--from", "hub", "--tasks", task, "--out", str(tmp_path / "out")]
        shown = CliRunner().invoke(main, words)
        assert shown.exit_code == 0, shown.output
    assert "test 2376" in shown.output
    assert "test 1172" in shown.output
