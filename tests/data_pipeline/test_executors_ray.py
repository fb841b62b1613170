"""One Ray for all tests of this module: the tests' own executors find it running, and leave it so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from data_pipeline.config import RaySection
from data_pipeline.executors.ray import RayExecutor
from data_pipeline.run import run_job
from megagpt.errors import DataError
from tests.data_pipeline import executor_tasks as tasks

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with RayExecutor(2, RaySection(memory_gb_per_task=0.5)) as executor:
        executor.run([tasks.task(0, tasks.fine, 0)], tmp_path_factory.mktemp("first"), lambda *_: None)
        started = rays_processes()
        assert any("raylet" in process.name() for process in started)
        yield
        started |= rays_processes()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == [], "Ray's processes end with the executor"


def rays_processes() -> set[psutil.Process]:
    """Children of this process that are no workers of a local executor."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "multiprocessing" not in " ".join(child.cmdline()):
                found.add(child)
    return found


@pytest.fixture
def tombs(tmp_path: Path) -> Path:
    (tmp_path / "tombs").mkdir()
    return tmp_path / "tombs"


def executor(**settings) -> RayExecutor:
    return RayExecutor(2, RaySection(**{"memory_gb_per_task": 0.5, **settings}))


def test_ray_leaves_the_same_bytes_though_a_worker_is_killed_mid_task(tmp_path: Path, tombs: Path):
    jobs = [tasks.task(n, tasks.fine, n) for n in range(4)]
    jobs[1] = tasks.task(1, tasks.killed, 1, tombs, 2)
    tasks.run(executor(), tmp_path / "job", jobs)
    assert len(list(tombs.iterdir())) == 2
    assert tasks.bytes_of(tmp_path / "job") == tasks.expected_bytes(tmp_path / "expected", range(4))


def test_a_whole_job_leaves_the_same_bytes_as_the_local_executor(tmp_path: Path):
    jobs = [
        tasks.small_job(tmp_path, name, executor=name, workers=2, ray={"memory_gb_per_task": 0.5})
        for name in ("local", "ray")
    ]
    for job in jobs:
        run_job(job)
    assert tasks.results_of(jobs[0]) == tasks.results_of(jobs[1])


def test_relative_paths_mean_what_they_mean_where_the_job_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    tasks.run(executor(), Path("job"), [tasks.task(0, tasks.greedy, Path("pid"), 0)])
    assert int((tmp_path / "pid").read_text()) > 0


def test_a_task_that_is_killed_every_time_is_named(tmp_path: Path, tombs: Path):
    jobs = [tasks.task(0, tasks.killed, 1, tombs, 99), tasks.task(1, tasks.slow, 1)]
    with pytest.raises(DataError, match=r"^map 000000 \(0\.jsonl\): given up after 3 attempts; .*WorkerCrashedError"):
        tasks.run(executor(), tmp_path, jobs)
    assert len(list(tombs.iterdir())) == 3


def test_attempts_that_note_a_deadly_record_do_not_count(tmp_path: Path, tombs: Path):
    tasks.run(executor(), tmp_path, [tasks.poisoned_task(0, tmp_path, (2, 4, 6, 8), tombs)])
    assert len(list(tombs.iterdir())) == 4
    assert (tmp_path / "stages/map/000000/kept.txt").read_text().split()[:4] == ["0", "1", "3", "5"]


def test_errors_name_the_task_and_defects_keep_their_type(tmp_path: Path):
    with pytest.raises(DataError, match=r"^map 000000 \(0\.jsonl\): line 3 is no JSON$"):
        tasks.run(executor(), tmp_path / "a", [tasks.task(0, tasks.says, "data")])
    with pytest.raises(ZeroDivisionError) as error:
        tasks.run(executor(), tmp_path / "b", [tasks.task(0, tasks.says, "bug")])
    assert "while running map 000000 (0.jsonl)" in error.value.__notes__


def test_more_memory_than_any_node_has_is_an_error_and_no_wait(tmp_path: Path):
    with pytest.raises(DataError, match=r"ray\.memory_gb_per_task: 4000\.0 GB for a task, but the largest node"):
        tasks.run(executor(memory_gb_per_task=4000.0), tmp_path, [tasks.task(0, tasks.fine, 0)])


def test_without_ray_it_is_said_what_to_install():
    code = """
import sys
sys.modules["ray"] = None
from data_pipeline.config import RaySection
from data_pipeline.executors.ray import RayExecutor
from megagpt.errors import DataError
try:
    RayExecutor(2, RaySection())
except DataError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True)
    assert "`pip install megagpt[ray]`" in found.stdout
