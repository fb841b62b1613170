"""Data of the official size but of another hash: found where the task is planned, kept in its result."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from evals import data
from evals.benchmarks import BENCHMARKS
from evals.caveats import DIFFERS, caveats
from evals.data_checksum import DIFFERS as FOUND
from evals.data_checksum import checksum_of, together
from evals.results import Metric
from evals.task_loader import plan_task
from megagpt.errors import EvalError
from tests.evals.fixtures import gsm8k_rows
from tests.evals.result_files import make_result


def write_source(folder: Path) -> Path:
    (folder / "gsm8k").mkdir(parents=True)
    for split in ("train", "test"):
        (folder / "gsm8k" / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in gsm8k_rows()))
    return folder


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A benchmark of eight rows a split, which are its official number here; their hash is not the known one."""
    source = write_source(tmp_path / "raw")
    benchmark = BENCHMARKS["gsm8k"]
    fields = {name: getattr(benchmark, name) for name in benchmark.__dataclass_fields__}
    small = type(benchmark)(**{**fields, "rows": {"train": 8, "test": 8}})
    monkeypatch.setattr(data, "BENCHMARKS", {"gsm8k": small})
    return source


def test_the_plan_says_that_the_files_are_another_copy_and_so_do_result_and_caveats(source, tmp_path) -> None:
    plan = plan_task("gsm8k", source, tmp_path / "cache")
    assert plan.data.checksum == DIFFERS == FOUND
    result = make_result("gsm8k", {"exact_match": Metric(0.5)}, data={**asdict(plan.data)})
    (told,) = caveats(result)
    assert told == (
        "the data files have the official number of rows but are not the copy that was checked: scores may differ"
    )


def test_the_known_copy_and_data_that_nobody_prepared_need_no_word(source, tmp_path) -> None:
    plan_task("gsm8k", source, tmp_path / "cache")
    (record,) = (tmp_path / "cache").glob("prepared/*/prepared.json")
    record.write_text(record.read_text().replace('"checksum": "differs"', '"checksum": "known"'))
    folder = record.parent / "openai" / "gsm8k"
    assert checksum_of(folder, "openai/gsm8k", {"main"}) == "known"
    assert checksum_of(folder, "openai/gsm8k", {"socratic"}) == ""
    record.unlink()
    assert checksum_of(folder, "openai/gsm8k", {"main"}) == ""
    record.write_text("{}")
    with pytest.raises(EvalError, match=r"prepared\.json: not what `prepare` writes"):
        checksum_of(folder, "openai/gsm8k", {"main"})


def test_of_several_data_sets_one_that_differs_is_enough() -> None:
    assert [together(found) for found in ({"known"}, {"known", "differs"}, {"known", ""}, set())] == [
        "known",
        "differs",
        "",
        "",
    ]
