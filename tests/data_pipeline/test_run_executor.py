import os
import time
from pathlib import Path

import pytest

from data_pipeline.executor import LocalExecutor
from data_pipeline.tasks import Counts, Finished, Task, commit
from megagpt.errors import DataError


def work(folder: Path, what: str, progress=None) -> Counts:
    match what:
        case "die":
            os._exit(9)
        case "data":
            raise DataError("line 3 is no JSON")
        case "disk":
            raise OSError(28, "No space left on device")
        case "bug":
            raise ZeroDivisionError("division by zero")
        case "slow":
            time.sleep(0.3)
    (folder / "out.txt").write_text(what)
    if progress is not None:
        progress(10, 1)
    return Counts(1, 1)


def tasks(*kinds: str) -> list[Task]:
    return [
        Task("map", f"{i:06d}", f"{kind}.jsonl", work, (kind,), {}, "code", {}, Path("stages/map") / str(i), 10)
        for i, kind in enumerate(kinds)
    ]


def run(job: Path, workers: int, *kinds: str) -> list[str]:
    done: list[str] = []

    def keep(task: Task, finished: Finished) -> None:
        commit(task, finished, job)
        done.append(task.partition)

    with LocalExecutor(workers) as executor:
        executor.run(tasks(*kinds), job, keep)
    return done


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_is_committed_once(tmp_path: Path, workers: int):
    assert sorted(run(tmp_path, workers, "slow", "fine", "fine")) == ["000000", "000001", "000002"]
    assert (tmp_path / "stages/map/2/out.txt").read_text() == "fine"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("kind", "message"), [("data", "line 3 is no JSON"), ("disk", r"\[Errno 28\] No space left on device")]
)
def test_what_the_user_can_mend_names_the_task_and_its_shard(tmp_path: Path, workers: int, kind: str, message: str):
    with pytest.raises(DataError, match=rf"^map 000001 \({kind}.jsonl\): {message}$"):
        run(tmp_path, workers, "fine", kind)


def test_a_killed_worker_is_an_error_that_names_what_was_at_work(tmp_path: Path):
    with pytest.raises(DataError, match=r"a worker process was killed .* map 000000 \(die.jsonl\)"):
        run(tmp_path, 2, "die", "slow", "fine", "fine")


def test_a_defect_keeps_its_type_and_says_where_it_happened(tmp_path: Path):
    with pytest.raises(ZeroDivisionError) as error:
        run(tmp_path, 2, "bug", "fine")
    assert "while running map 000000 (bug.jsonl)" in error.value.__notes__
