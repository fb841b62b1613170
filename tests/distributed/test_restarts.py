"""Every way in which a rank can stop working, under the supervisor: the run ends with the weights of a calm one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from megagpt.train.stop import STOPPED
from tests.distributed.processes import start, train_command
from tests.distributed.runs import metric_rows
from tests.distributed.test_launcher import LAUNCHER, ROOT
from tests.distributed.test_resume import files_of, published, wait_until
from tests.tiny import run_words

pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(400)]

STEPS = 12
FAULTY = """
import os, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from megagpt.train.run import exit_process, main
from tests.distributed.faults import FAULTS, Fault

fault, happened = Fault({kind!r}, {rank}, {at}), Path({happened!r} + os.environ["RANK"])
if int(os.environ["RANK"]) == fault.rank and not happened.exists():
    happened.touch()
    FAULTS[fault.kind](fault)
exit_process(main(sys.argv[1:], os.environ))
"""
SUPERVISED = """
import os, sys
from pathlib import Path
from megagpt.supervise.supervisor import Patience, Supervisor

supervisor = Supervisor(Path(sys.argv[1]), lambda: sys.argv[2:], os.environ, Patience(1, 0.2), print, 12)
sys.exit(supervisor.run())
"""


def supervise(tmp_path, kind, world_size, rank, at, words):
    """A run under a supervisor; a rank has a fault once. Exit code and the log's end."""
    script, program, log = tmp_path / "faulty.py", tmp_path / "supervise.py", tmp_path / "log"
    happened = str(tmp_path / "happened.")
    script.write_text(FAULTY.format(root=str(ROOT), kind=kind, rank=rank, at=at, happened=happened))
    program.write_text(textwrap.dedent(SUPERVISED))
    port = str(20_000 + os.getpid() % 20_000)
    launcher = [str(LAUNCHER), "--num_accelerators", str(world_size), "--master_port", port, str(script)]
    with log.open("wb") as out:
        done = subprocess.run(
            [sys.executable, str(program), str(tmp_path / "run"), *launcher, *words],
            stdout=out, stderr=subprocess.STDOUT, check=False, cwd=ROOT,
        )  # fmt: skip
    return done.returncode, log.read_text()[-5000:]


@pytest.fixture(scope="module")
def calm_run(tmp_path_factory, tokens):
    """The folder of the run without a fault, made once for all rows that have it in common."""
    made = {}

    def run(world_size, words):
        key = (world_size, *words)
        if key not in made:
            folder = tmp_path_factory.mktemp("calm")
            group = start(train_command, world_size, run_words(folder / "run", tokens, *words), log=folder / "log")
            group.finish()
            made[key] = folder / "run"
        return made[key]

    return run


@pytest.mark.parametrize(
    ("kind", "world_size", "rank", "at", "layout"),
    [
        ("killed", 2, 1, 6, ["parallel.zero_stage=2"]),
        ("stopped", 2, 0, 6, ["parallel.zero_stage=3"]),
        ("sleeps in loader", 2, 1, 6, ["parallel.tensor=2"]),
        ("sleeps in step", 4, 3, 6, ["parallel.pipeline=2", "parallel.tensor=2"]),
        ("sleeps in eval", 2, 0, 2, []),
        ("sleeps in save", 2, 1, 3, []),
        ("sleeps in writer", 2, 1, 2, []),
        ("killed in eval", 2, 1, 3, []),  # the second checkpoint is under way, so the first is there
        ("stopped in eval", 2, 0, 2, ["parallel.zero_stage=3"]),
        ("killed in writer", 2, 1, 2, []),
        ("stopped in writer", 2, 1, 2, []),
        ("killed in writer", 2, 0, 3, ["checkpoint.asynchronous=false"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_run_ends_as_a_calm_one(kind, world_size, rank, at, layout, tmp_path, tokens, val_tokens, calm_run):
    usual = [f"data.val={val_tokens}", "eval.every=4", "eval.sequences=8", "checkpoint.save_every=3"]
    usual += [f"train.max_steps={STEPS}", "model.dropout=0.1", *layout]
    words = run_words(tmp_path / "run", tokens, *usual)
    deadlines = [f"watch.{phase}_seconds=6" for phase in ("step", "eval", "save")]
    code, told = supervise(tmp_path, kind, world_size, rank, at, [*words, *deadlines])
    assert code == 0, told
    calm = calm_run(world_size, usual)
    assert files_of(tmp_path / "run", STEPS) == files_of(calm, STEPS)
    assert metric_rows(tmp_path / "run") == metric_rows(calm)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    names = [event["event"] for event in events if event["event"] != "saved"]
    assert names == ["started", "hung", "failed", "resumed", "finished"], names
    assert events[[event["event"] for event in events].index("hung")]["ranks"] == [rank]
    here = str(tmp_path)
    assert [one.pid for one in psutil.process_iter(["cmdline"]) if here in " ".join(one.info["cmdline"] or ())] == []


def test_a_preemption_saves_that_step_before_an_evaluation_that_is_due(tmp_path, tokens, val_tokens):
    """SIGTERM to the supervisor while step 4 is computed; the evaluation after it hangs, and the disk is slow."""
    usual = [f"data.val={val_tokens}", "eval.every=4", "eval.sequences=8", "checkpoint.save_every=0"]
    words = run_words(tmp_path / "run", tokens, *usual, f"train.max_steps={STEPS}", "log.progress=true")
    code, told = supervise(tmp_path, "preempted", 2, 1, 4, words)
    assert code == 0, told
    assert published(tmp_path / "run") == [4]
    assert "step 4: validation left out because of the stop" in told
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events == ["started", "saved", "stopped"]


def test_a_preemption_during_the_start_ends_ranks_that_wait_for_another(tmp_path, tokens):
    """Nothing was to be saved, and nobody knows for how long they would wait."""
    began = time.monotonic()
    code, told = supervise(tmp_path, "preempted at start", 2, 1, 1, run_words(tmp_path / "run", tokens))
    assert code == STOPPED, told
    assert "rank 0: the launcher had ended during the start; nothing was to be saved" in told
    assert time.monotonic() - began < 45
    assert not (tmp_path / "run" / "events.jsonl").exists()
    here = str(tmp_path)
    assert [one.pid for one in psutil.process_iter(["cmdline"]) if here in " ".join(one.info["cmdline"] or ())] == []


@pytest.mark.parametrize("killed", ["deepspeed.launcher.launch", "bin/deepspeed"])
def test_a_launcher_that_is_killed_is_no_end(killed, tmp_path, tokens):
    """Its ranks save and stop, and `deepspeed` may end with 0: nobody has asked for that."""
    usual = ["checkpoint.save_every=20", "train.max_steps=300"]
    calm = start(train_command, 2, run_words(tmp_path / "calm", tokens, *usual), log=tmp_path / "calm.log")
    options = ["--restarts", "1", "--wait", "0.2", "--processes", "2"]
    options += ["--launcher-args", f"--master_port {20_000 + os.getpid() % 20_000}"]
    run_dir, log = tmp_path / "run", tmp_path / "log"
    with log.open("wb") as out:
        words = [LAUNCHER.with_name("megagpt"), "train", *options, *run_words(run_dir, tokens, *usual)]
        supervisor = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: len(published(run_dir)) >= 2)
        for process in psutil.Process(supervisor.pid).children(recursive=True):
            if any(killed in word for word in process.cmdline()[:5]):
                process.kill()
                break
        assert supervisor.wait(200) == 0, log.read_text()
    finally:
        supervisor.terminate()
        supervisor.wait()
    calm.finish()
    assert "starting again" in log.read_text()
    assert files_of(run_dir, 300) == files_of(tmp_path / "calm", 300)
    assert metric_rows(run_dir) == metric_rows(tmp_path / "calm")
