"""Started by test_faults.py as a program of its own: forks one process a job, which is killed where the test says.

One line of JSON in, one out: {"config": FILE, "kill_at": N or null, "commits": BOOL} ->
{"calls": N, "killed": BOOL, "error": TEXT}. A call is one that changes the job's folder: rename, remove, make a folder,
open for writing; with "commits" not in the scratch folder, where nothing is believed, nor for `data status`. They are
counted by an audit hook, so that nothing of the code under test is replaced.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import duckdb  # noqa: F401
import numba  # noqa: F401
import pyarrow.parquet  # noqa: F401

from data_pipeline.config import DataJob
from data_pipeline.run import run_job
from megagpt.config.load import load_config

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Killer:
    """Ends the process, without a chance to tidy up, before call number `kill_at`."""

    def __init__(self, out: Path, kill_at: int | None, *, commits: bool) -> None:
        self.folder = str(out)
        shown = [str(out / "stages" / name) for name in ("progress.json", ".progress", "tasks.json", ".tasks")]
        self.passed_over = (str(out / "scratch"), *shown) if commits else ()
        self.kill_at = kill_at
        self.calls = 0

    def __call__(self, event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & WRITES)
        if not (writes or event in CHANGES):
            return
        place = str(arguments[1] if event == "os.rename" else arguments[0])
        if place.startswith(self.folder) and not place.startswith(self.passed_over):
            if self.calls == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.calls += 1


def run(config: str, kill_at: int | None, report: int, *, commits: bool) -> None:
    job = load_config(DataJob, [Path(config)])
    killer = Killer(job.out, kill_at, commits=commits)
    sys.addaudithook(killer)
    error = ""
    try:
        run_job(job)
    except Exception as problem:  # noqa: BLE001 - the test reads it
        error = "".join(traceback.format_exception(problem))
    os.write(report, json.dumps({"calls": killer.calls, "killed": False, "error": error}).encode())
    os._exit(0)


def serve() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            run(order["config"], order["kill_at"], writer, commits=order["commits"])
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        answer = said.decode() if said else json.dumps({"calls": -1, "killed": os.WIFSIGNALED(status), "error": ""})
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
