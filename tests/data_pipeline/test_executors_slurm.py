"""The Slurm executor with submitit's `local` cluster: the same elements and files, as processes of this machine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_pipeline.config import SlurmSection
from data_pipeline.executors import slurm
from data_pipeline.executors.slurm import SlurmExecutor
from data_pipeline.run import run_job
from megagpt.errors import DataError
from tests.data_pipeline import executor_tasks as tasks

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def tombs(tmp_path: Path) -> Path:
    (tmp_path / "tombs").mkdir()
    return tmp_path / "tombs"


def executor() -> SlurmExecutor:
    return SlurmExecutor(2, SlurmSection(), cluster="local")


def test_array_elements_leave_the_same_bytes_though_one_is_killed_mid_task(tmp_path: Path, tombs: Path):
    jobs = [tasks.task(0, tasks.fine, 0), tasks.task(1, tasks.killed, 1, tombs, 2), tasks.task(2, tasks.fine, 2)]
    tasks.run(executor(), tmp_path / "job", jobs)
    assert len(list(tombs.iterdir())) == 2
    assert tasks.bytes_of(tmp_path / "job") == tasks.expected_bytes(tmp_path / "expected", range(3))


def test_the_stages_of_a_job_leave_the_same_bytes_as_with_the_local_executor(tmp_path: Path):
    jobs = [tasks.small_job(tmp_path, name, executor=name, workers=2) for name in ("local", "slurm")]
    run_job(jobs[0], until="signatures")
    run_job(jobs[1], until="signatures", executor=executor())
    assert "signatures/000001" in tasks.results_of(jobs[0])
    assert tasks.results_of(jobs[0]) == tasks.results_of(jobs[1])


def test_of_the_tasks_that_share_an_element_only_the_one_at_work_counts_an_attempt(
    tmp_path: Path, tombs: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(slurm, "MAX_ELEMENTS", 1)
    jobs = [
        tasks.task(0, tasks.fine, 0),
        tasks.task(1, tasks.killed, 1, tombs, 2),
        tasks.task(2, tasks.fine, 2),
        tasks.task(3, tasks.fine, 3),
    ]
    done = tasks.run(executor(), tmp_path / "job", jobs)
    assert done == [one.partition for one in jobs]
    assert len(list((tmp_path / "job/stages/slurm_logs").glob("*.err"))) == 3, "one element, submitted three times"
    assert tasks.bytes_of(tmp_path / "job") == tasks.expected_bytes(tmp_path / "expected", range(4))


def test_a_task_that_is_killed_every_time_is_named_with_its_log(tmp_path: Path, tombs: Path):
    message = (
        r"^map 000000 \(0\.jsonl\): given up after 3 attempts; .*lost with Slurm job \d+, log .*/stages/slurm_logs/"
    )
    with pytest.raises(DataError, match=message):
        tasks.run(executor(), tmp_path, [tasks.task(0, tasks.killed, 0, tombs, 99)])
    assert len(list(tombs.iterdir())) == 3


def test_attempts_that_note_a_deadly_record_do_not_cost_a_place_in_the_queue(tmp_path: Path, tombs: Path):
    tasks.run(executor(), tmp_path, [tasks.poisoned_task(0, tmp_path, (2, 4, 6, 8), tombs)])
    assert len(list(tombs.iterdir())) == 4
    assert len(list((tmp_path / "stages/slurm_logs").glob("*.err"))) == 1
    counts = json.loads((tmp_path / "stages/map/000000.json").read_text())["counts"]
    assert counts["rejected"] == {"extract.crashed": 4}


def test_errors_name_the_task_and_defects_keep_their_type(tmp_path: Path):
    with pytest.raises(DataError, match=r"^map 000000 \(0\.jsonl\): line 3 is no JSON$"):
        tasks.run(executor(), tmp_path / "a", [tasks.task(0, tasks.says, "data")])
    with pytest.raises(ZeroDivisionError) as error:
        tasks.run(executor(), tmp_path / "b", [tasks.task(0, tasks.says, "bug")])
    assert "while running map 000000 (0.jsonl)" in error.value.__notes__


def test_elements_are_cancelled_when_the_driver_is_terminated(tmp_path: Path):
    code = f"""
import sys
from pathlib import Path
from data_pipeline.config import SlurmSection
from data_pipeline.executors.slurm import SlurmExecutor
from tests.data_pipeline import executor_tasks as tasks
tasks.run(SlurmExecutor(2, SlurmSection(), cluster="local"), Path({str(tmp_path)!r}),
          [tasks.task(n, tasks.slow, n) for n in range(2)])
"""
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=REPO)
    until = time.monotonic() + 60
    while not list(tmp_path.glob("scratch/map/*/*/alive.json")) and time.monotonic() < until:
        time.sleep(0.05)
    elements = psutil.Process(driver.pid).children(recursive=True)
    assert elements
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(timeout=30) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(elements, timeout=10)
    assert alive == []
    assert not (tmp_path / "stages/map").exists()


def test_without_slurm_it_is_said_that_it_takes_no_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match='executor: slurm, but Slurm takes no jobs: Could not detect "srun"'):
        tasks.run(SlurmExecutor(2, SlurmSection()), tmp_path, [tasks.task(0, tasks.fine, 0)])


def test_without_submitit_it_is_said_what_to_install():
    code = """
import sys
sys.modules["submitit"] = None
from data_pipeline.config import SlurmSection
from data_pipeline.executors.slurm import SlurmExecutor
from megagpt.errors import DataError
try:
    SlurmExecutor(2, SlurmSection())
except DataError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True)
    assert "`pip install megagpt[slurm]`" in found.stdout
