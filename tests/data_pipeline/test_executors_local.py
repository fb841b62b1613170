import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from data_pipeline.executors.local import LocalExecutor
from data_pipeline.executors.progress import read_progress
from data_pipeline.run import run_job
from megagpt.errors import DataError
from tests.data_pipeline import executor_tasks as tasks

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def tombs(tmp_path: Path) -> Path:
    (tmp_path / "tombs").mkdir()
    return tmp_path / "tombs"


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_leaves_the_same_bytes_and_nothing_else(tmp_path: Path, workers: int):
    jobs = [tasks.task(n, tasks.fine, n) for n in range(5)]
    assert sorted(tasks.run(LocalExecutor(workers), tmp_path / "job", jobs)) == [one.partition for one in jobs]
    assert tasks.bytes_of(tmp_path / "job") == tasks.expected_bytes(tmp_path / "expected", range(5))
    assert not list((tmp_path / "job/scratch").rglob("*.*"))


def test_a_whole_job_leaves_the_same_bytes_with_any_number_of_workers(tmp_path: Path):
    jobs = [tasks.small_job(tmp_path, f"with_{workers}", workers=workers) for workers in (1, 3)]
    for job in jobs:
        run_job(job)
    assert tasks.results_of(jobs[0]) == tasks.results_of(jobs[1])


def test_a_killed_worker_loses_its_own_task_only_and_that_is_tried_again(tmp_path: Path, tombs: Path):
    jobs = [
        tasks.task(0, tasks.killed, 0, tombs, 2),
        tasks.task(1, tasks.slow, 1),
        *(tasks.task(n, tasks.fine, n) for n in (2, 3)),
    ]
    tasks.run(LocalExecutor(2), tmp_path / "job", jobs)
    assert len(list(tombs.iterdir())) == 2
    assert tasks.bytes_of(tmp_path / "job") == tasks.expected_bytes(tmp_path / "expected", range(4))


def test_a_task_that_is_killed_every_time_is_named_and_the_others_are_kept(tmp_path: Path, tombs: Path):
    jobs = [tasks.task(0, tasks.fine, 0), tasks.task(1, tasks.killed, 1, tombs, 99), tasks.task(2, tasks.slow, 2)]
    message = r"^map 000001 \(1\.jsonl\): given up after 3 attempts; .* was killed by SIGKILL \(out of memory\?\)"
    with pytest.raises(DataError, match=message):
        tasks.run(LocalExecutor(2), tmp_path, jobs)
    assert len(list(tombs.iterdir())) == 3
    assert (tmp_path / "stages/map/000000.json").is_file()
    assert not (tmp_path / "stages/map/000001").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_attempts_that_note_a_deadly_record_do_not_count(tmp_path: Path, tombs: Path, workers: int):
    job = tmp_path / "job"
    left_by_an_earlier_run = job / "stages/map/000000.poison.json"
    left_by_an_earlier_run.parent.mkdir(parents=True)
    left_by_an_earlier_run.write_text('{"timeout_seconds": 20.0, "pages": {"7": "extract.timeout"}}')
    jobs = [tasks.poisoned_task(0, job, (3, 5, 8, 11, 19), tombs), tasks.task(1, tasks.fine, 1)]
    tasks.run(LocalExecutor(workers), job, jobs)
    assert len(list(tombs.iterdir())) == 5
    record = json.loads((job / "stages/map/000000.json").read_text())
    assert record["counts"]["rejected"] == {"extract.crashed": 5}
    assert (job / "stages/map/000000/kept.txt").read_text().split() == [
        str(n) for n in range(20) if n not in (3, 5, 8, 11, 19)
    ]


def test_a_task_with_a_poison_file_that_dies_without_a_note_is_given_up(tmp_path: Path, tombs: Path):
    one = tasks.task(0, tasks.killed, 0, tombs, 99, poison=Path("stages/map/000000.poison.json"))
    with pytest.raises(DataError, match="given up after 3 attempts"):
        tasks.run(LocalExecutor(1), tmp_path, [one])


FULL_DISK = (
    r"\[Errno 28\] No space left on device; free some space and run the same command again: what was finished is kept"
)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("what", "message"), [("data", "line 3 is no JSON"), ("disk", FULL_DISK)])
def test_what_the_user_can_mend_names_the_task_and_its_shard(tmp_path: Path, workers: int, what: str, message: str):
    jobs = [tasks.task(0, tasks.fine, 0), tasks.task(1, tasks.says, what)]
    with pytest.raises(DataError, match=rf"^map 000001 \(1\.jsonl\): {message}$"):
        tasks.run(LocalExecutor(workers), tmp_path, jobs)


def test_a_defect_keeps_its_type_and_says_where_it_happened(tmp_path: Path):
    with pytest.raises(ZeroDivisionError) as error:
        tasks.run(LocalExecutor(2), tmp_path, [tasks.task(0, tasks.says, "bug"), tasks.task(1, tasks.fine, 1)])
    notes = "\n".join(error.value.__notes__)
    assert "while running map 000000 (0.jsonl)" in notes
    assert "executor_tasks.py" in notes, "the worker's traceback goes along"


def test_a_worker_that_holds_too_much_memory_is_replaced(tmp_path: Path):
    greedy = [tasks.task(n, tasks.greedy, tmp_path / f"{n}.pid", (200 << 20) if n == 1 else 0) for n in range(3)]
    with LocalExecutor(2, recycle_bytes=150 << 20) as executor:
        for one in greedy:
            executor.run([one], tmp_path, lambda task, finished: None)
    pids = [int((tmp_path / f"{n}.pid").read_text()) for n in range(3)]
    assert pids[0] == pids[1] != pids[2]


def test_what_runs_is_told_every_second_and_forgotten_at_the_end(tmp_path: Path):
    seen = []

    def watch():
        while thread_of_job.is_alive():
            if (progress := read_progress(tmp_path)) is not None:
                seen.append(progress)
            time.sleep(0.05)

    jobs = [tasks.task(0, tasks.fine, 0), tasks.task(1, tasks.slow, 1), tasks.task(2, tasks.slow, 2)]
    thread_of_job = threading.Thread(target=tasks.run, args=(LocalExecutor(2), tmp_path, jobs))
    watcher = threading.Thread(target=watch)
    thread_of_job.start()
    watcher.start()
    thread_of_job.join()
    watcher.join()
    assert {(one.stage, one.tasks_total, one.bytes_total, one.pid) for one in seen} == {("map", 3, 60, os.getpid())}
    assert any(0 < one.bytes_done < 60 and one.tasks_done < 3 for one in seen), "the work of tasks under way is shown"
    assert all(one.started <= one.updated for one in seen)
    assert read_progress(tmp_path) is None


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path):
    code = f"""
import sys; sys.path.insert(0, {str(REPO)!r})
from pathlib import Path
from data_pipeline.executors.local import LocalExecutor
from tests.data_pipeline import executor_tasks as tasks
if __name__ == "__main__":
    tasks.run(LocalExecutor(2), Path({str(tmp_path)!r}), [tasks.task(n, tasks.slow, n) for n in range(20)])
"""
    script = tmp_path / "parent.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, str(script)], cwd=REPO)
    until = time.monotonic() + 60
    while len(list(tmp_path.glob("scratch/map/*/*/alive.json"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    workers = [child for child in psutil.Process(parent.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []
