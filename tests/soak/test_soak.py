"""Half an hour of random faults: the run that is watched over ends as the one that nothing happened to.

`make test-soak` runs it; `--soak-minutes` says how long, `--soak-seed` which faults. What is injected is what long runs
report: a rank killed, a rank stopped dead, the launcher killed, a checkpoint damaged on disk, a preemption.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from megagpt.checkpoint.store import CheckpointStore, verify_checkpoint
from megagpt.supervise.supervisor import STOPPED
from megagpt.train.events import goodput
from tests.distributed.processes import start, train_command
from tests.distributed.test_resume import files_of, published, rows, step_dir, wait_until
from tests.tiny import run_words

LOG = logging.getLogger(__name__)
MEGAGPT = Path(sys.executable).with_name("megagpt")
SAVE_EVERY = 20
ENDLESS = 10**9
"""Steps: nothing but the end of the faults ends the run."""
STEPS_AFTER_FAULTS = 30

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]


class Watched:
    """A run under `megagpt train --restarts`, started again by us only after a preemption."""

    def __init__(self, run_dir: Path, words: list[str], log: Path) -> None:
        self.run_dir = run_dir
        self._words = words
        self._log = log
        self.start(ENDLESS)

    def start(self, steps: int) -> None:
        port = str(20_000 + os.getpid() % 20_000)
        options = ["--restarts", "5", "--wait", "0.5", "--processes", "2", "--launcher-args", f"--master_port {port}"]
        with self._log.open("ab") as out:
            self.process = subprocess.Popen(
                [MEGAGPT, "train", *options, *self._words, f"train.max_steps={steps}"],
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def stop(self, number: int) -> None:
        """Ask it to save and end."""
        self.process.send_signal(number)
        assert self.process.wait(120) in (0, STOPPED), self._log.read_text()[-5000:]

    def below(self, *words: str) -> list[psutil.Process]:
        """Processes under the supervisor whose command line has one of these words."""
        found = []
        with suppress(psutil.Error):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    if any(word in part for word in words for part in process.cmdline()):
                        found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        return [one for one in self.below("--local_rank=") if "deepspeed.launcher.launch" not in one.cmdline()]


def kill_a_rank(run: Watched, choose: random.Random) -> None:
    choose.choice(run.ranks()).kill()


def stop_a_rank(run: Watched, choose: random.Random) -> None:
    choose.choice(run.ranks()).suspend()


def kill_the_launcher(run: Watched, choose: random.Random) -> None:
    choose.choice(run.below("deepspeed.launcher.launch", "bin/deepspeed")).kill()


def kill_all_and_damage_the_newest_checkpoint(run: Watched, choose: random.Random) -> None:
    steps = published(run.run_dir)
    if len(steps) < 2:
        raise IndexError("nothing older would be left")
    for rank in run.ranks():
        rank.kill()
    files = sorted(step_dir(run.run_dir, steps[-1]).iterdir())
    damaged = choose.choice(files)
    content = bytearray(damaged.read_bytes())
    content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
    damaged.write_bytes(content)


def preempt(run: Watched, choose: random.Random) -> None:
    run.stop(choose.choice([signal.SIGTERM, signal.SIGUSR1]))
    run.start(ENDLESS)


FAULTS = (kill_a_rank, stop_a_rank, kill_the_launcher, kill_all_and_damage_the_newest_checkpoint, preempt)


def inject(run: Watched, minutes: float, choose: random.Random) -> Counter[str]:
    """Faults at random moments for so long; how many of each kind met a process."""
    injected: Counter[str] = Counter()
    until = time.monotonic() + 60 * minutes
    while time.monotonic() < until:
        at = time.monotonic() + choose.uniform(2, 20)
        wait_until(lambda at=at: time.monotonic() > at or run.process.poll() is not None, 30)
        assert run.process.poll() is None, "the supervisor has ended"
        fault = choose.choice(FAULTS)
        before = published(run.run_dir)
        with suppress(IndexError, psutil.Error):  # nothing is running that could be hit just now
            fault(run, choose)
            injected[fault.__name__] += 1
            LOG.info("%d: %s, checkpoints %s", injected.total(), fault.__name__, before)
    return injected


def test_a_run_under_random_faults_ends_bit_for_bit_as_the_one_without(tmp_path, tokens, pytestconfig):
    minutes = pytestconfig.getoption("--soak-minutes")
    common = [
        f"checkpoint.save_every={SAVE_EVERY}",
        "checkpoint.keep_last=3",
        "model.dropout=0.1",
        "optim.schedule=constant",  # not the number of steps decides the rate
        "parallel.zero_stage=2",
    ]
    hung = ["watch.step_seconds=10", "watch.save_seconds=20"]
    shared_memory = set(Path("/dev/shm").iterdir())
    run = Watched(tmp_path / "run", run_words(tmp_path / "run", tokens, *common, *hung), tmp_path / "log")
    try:
        injected = inject(run, minutes, random.Random(pytestconfig.getoption("--soak-seed")))
        run.stop(signal.SIGTERM)
        steps = rows(run.run_dir)[-1]["step"] + STEPS_AFTER_FAULTS
        run.start(steps)
        assert run.process.wait(600) == 0, (tmp_path / "log").read_text()[-5000:]
    except BaseException:
        LOG.exception("the log's end:\n%s", (tmp_path / "log").read_text()[-20_000:])
        raise
    finally:
        with suppress(ProcessLookupError):
            run.process.terminate()
            run.process.wait(120)
    assert injected.total() >= minutes
    words = run_words(tmp_path / "calm", tokens, *common, f"train.max_steps={steps}")
    start(train_command, 2, words, log=tmp_path / "calm.log").finish(7200)
    assert files_of(run.run_dir, steps) == files_of(tmp_path / "calm", steps)
    assert rows(run.run_dir) == rows(tmp_path / "calm")
    nothing_is_left(run.run_dir, shared_memory)
    events = [json.loads(line) for line in (run.run_dir / "events.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    spent = goodput(events, metrics)
    LOG.info(
        "%s; %d steps, %d restarts, goodput %.1f %%, %s",
        dict(injected),
        steps,
        spent.restarts,
        100 * spent.fraction,
        spent.lost,
    )


def nothing_is_left(run_dir: Path, shared_memory: set[Path]) -> None:
    """No process, no half checkpoint beside those kept and those set aside, no shared memory."""
    words = str(run_dir)
    assert [one.pid for one in psutil.process_iter(["cmdline"]) if words in " ".join(one.info["cmdline"] or ())] == []
    store = CheckpointStore(run_dir / "checkpoints")
    assert len(store.steps()) <= 3
    for step in store.steps():
        verify_checkpoint(store.step_dir(step))
    assert not list(store.folder.glob("*.tmp"))
    assert not list(store.folder.glob("*.removed"))
    assert set(Path("/dev/shm").iterdir()) - shared_memory == set()
