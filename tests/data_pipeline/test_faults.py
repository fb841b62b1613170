"""A data job that is killed anywhere and started again ends with the bytes of one that was not."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megagpt.config.load import dump_config
from tests.data_pipeline.test_run import REPO, job_for, write_corpus

MOST_SECONDS = 12.0
"""Of a run before it is killed: on a busy machine the first run may take far longer, and a hundred kills an hour."""
EVERYTHING = {
    "filters": {"unicode_repair": {}, "gopher_repetition": {}, "pii": {}},
    "dedup": {"units": "line", "substring_tokens": 50, "verify_jaccard": 0.5},
    "pack": {"val_fraction": 0.1, "test_fraction": 0.1, "per_source": True},
}
"""Every stage has tasks."""


class Server:
    """Runs jobs in forked processes, which start at once and can be killed at a counted call."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("fault_server.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPO, text=True)

    def run(self, config: Path, kill_at: int | None = None, *, commits: bool = False) -> dict[str, Any]:
        order = {"config": str(config), "kill_at": kill_at, "commits": commits}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert answer["error"] == "", answer["error"]
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job in which every stage has tasks; its folder is FOLDER/job."""
    folder = tmp_path_factory.mktemp("faults")
    corpus = write_corpus(folder / "corpus", n_shards=2, n_documents=20)
    items = folder / "items.jsonl"
    text = json.loads((corpus / "0.jsonl").read_text().splitlines()[3])["text"]
    items.write_text(json.dumps({"task": "planted", "id": 0, "text": " ".join(text.split()[:30])}) + "\n")
    (folder / "domains").write_text("blocked.example\n")
    job = job_for(
        corpus,
        folder / "job",
        **EVERYTHING,
        decontamination={"items": [str(items)], "action": "excise"},
        url_filter={"domains": [str(folder / "domains")]},
    )
    path = folder / "job.yaml"
    path.write_text(dump_config(job))
    return path


def snapshot(out: Path) -> dict[str, bytes]:
    """Every file of a finished job but those that tell of time: records (CPU seconds), reports, plan and progress."""
    told = {
        "report.json",
        "report.html",
        "report.md",
        "plan.json",
        "progress.json",
        "tasks.json",
        "job.yaml",
        "shard_hashes.json",
        ".lock",
    }
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = path.relative_to(out).as_posix()
        if path.suffix == ".json" and name.startswith("stages/") and name.count("/") == 2:
            record = json.loads(path.read_bytes())
            found[name] = json.dumps({k: v for k, v in record.items() if not k.endswith("_seconds")}).encode()
        elif path.name not in told:
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def whole(config: Path, server: Server) -> tuple[int, dict[str, bytes]]:
    """(calls of an uninterrupted run, its files)."""
    answer = server.run(config)
    files = snapshot(config.parent / "job")
    assert {name.split("/")[1] for name in files if name.startswith("stages/")} >= {"filter", "windows", "encode"}
    return answer["calls"], files


def kill_and_go_on(
    config: Path, server: Server, kill_at: int, files: dict[str, bytes], *, commits: bool = False
) -> None:
    out = config.parent / "job"
    shutil.rmtree(out)
    answer = server.run(config, kill_at, commits=commits)
    # A run may make a call less than the one that was counted (how often progress is shown follows the clock).
    assert answer["killed"] or answer["calls"] <= kill_at
    server.run(config)
    after = snapshot(out)
    assert after.keys() == files.keys()
    assert [name for name in files if after[name] != files[name]] == []


def test_killed_before_calls_spread_over_the_whole_job(config: Path, server: Server, whole):
    calls, files = whole
    for kill_at in sorted(random.Random(5).sample(range(calls), 5)):
        kill_and_go_on(config, server, kill_at, files)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_killed_before_many_more_calls(config: Path, server: Server, whole):
    calls, files = whole
    for kill_at in sorted(random.Random(6).sample(range(calls), 30)):
        kill_and_go_on(config, server, kill_at, files)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(8))
def test_killed_before_every_call_of_every_commit(config: Path, server: Server, whole, part: int):
    _, files = whole
    shutil.rmtree(config.parent / "job")
    calls = server.run(config, commits=True)["calls"]
    assert calls > 200
    for kill_at in range(part, calls, 8):
        kill_and_go_on(config, server, kill_at, files, commits=True)


def test_killed_twice_on_the_way(config: Path, server: Server, whole):
    calls, files = whole
    out = config.parent / "job"
    shutil.rmtree(out)
    assert server.run(config, calls // 2)["killed"]
    assert server.run(config, calls // 4)["killed"]
    server.run(config)
    assert snapshot(out) == files


def killed_at_random_moments(folder: Path, n_kills: int, workers: int) -> None:
    """The real program in a process group of its own, killed whole at work `n_kills` times.

    A kill that comes after the program has ended counts for nothing: how long a run takes is known only about.
    """
    corpus = write_corpus(folder / "corpus", n_shards=4)
    undisturbed = job_for(corpus, folder / "undisturbed", workers=workers, **EVERYTHING)
    disturbed = job_for(corpus, folder / "disturbed", workers=workers, **EVERYTHING)
    for job in (undisturbed, disturbed):
        (folder / f"{job.out.name}.yaml").write_text(dump_config(job))
    command = [str(Path(sys.executable).with_name("megagpt")), "data", "run"]
    started = time.perf_counter()
    subprocess.run([*command, str(folder / "undisturbed.yaml")], cwd=REPO, check=True, capture_output=True)
    longest = min(time.perf_counter() - started, MOST_SECONDS)
    rng = random.Random(n_kills)
    at_work = 0
    for _ in range(10 * n_kills):
        with subprocess.Popen(
            [*command, str(folder / "disturbed.yaml")],
            cwd=REPO,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            time.sleep(rng.uniform(0.1, 1.0) * longest)
            if process.poll() is None:
                at_work += 1
                process.send_signal(signal.SIGKILL)
        if (disturbed.out / "report.html").is_file():
            assert snapshot(disturbed.out).keys() == snapshot(undisturbed.out).keys()
            shutil.rmtree(disturbed.out)
        if at_work == n_kills:
            break
    assert at_work == n_kills
    subprocess.run([*command, str(folder / "disturbed.yaml")], cwd=REPO, check=True, capture_output=True)
    before, after = snapshot(undisturbed.out), snapshot(disturbed.out)
    assert [name for name in before if before[name] != after.get(name)] == []


def test_the_program_killed_at_random_moments_ends_with_the_same_bytes(tmp_path: Path):
    killed_at_random_moments(tmp_path, 2, workers=2)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_the_program_killed_at_a_hundred_random_moments(tmp_path: Path):
    killed_at_random_moments(tmp_path, 100, workers=2)
