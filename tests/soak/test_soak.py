"""Half an hour of random faults: the run that is watched over ends as the one that nothing happened to.

`make test-soak` runs it; `--soak-minutes` says how long, `--soak-seed` which faults. What is injected is what long runs
report: a rank killed, a rank stopped dead, both also in the middle of a save, the launcher killed, a checkpoint damaged
on disk, a preemption. Meanwhile, and in the run without faults, each process's open files and memory are looked at.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

from megagpt.checkpoint.store import CheckpointStore, verify_checkpoint
from megagpt.train.events import goodput
from megagpt.train.stop import STOPPED
from tests.distributed.processes import start, train_command
from tests.distributed.test_resume import files_of, published, rows, step_dir, wait_until
from tests.tiny import run_words

LOG = logging.getLogger(__name__)
MEGAGPT = Path(sys.executable).with_name("megagpt")
SAVE_EVERY = 20
ENDLESS = 10**9
"""Steps: nothing but the end of the faults ends the run."""
STEPS_AFTER_FAULTS = 1000
"""The calm stretch, in which open files and memory are looked at for half a minute or so."""
MOST_FILES_MORE = 3
"""Open files that a process may have more of at the end of its life than after the first checkpoint that it has seen:
what it takes until then, importing, compiling, filling its caches, is no leak."""
MOST_MIB_MORE = 32.0
"""The same of its memory."""
LEAST_GOODPUT = 0.03
"""Fraction of the time that was spent in steps that count: with a fault every 11 seconds on average, and as many for
each start on two busy cores, most of it is not."""

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
        # Faults may fall into many starts in a row, and to give up then is right (and tested elsewhere).
        options = ["--restarts", "100", "--wait", "0.5", "--processes", "2", "--launcher-args", f"--master_port {port}"]
        with self._log.open("ab") as out:
            self.process = subprocess.Popen(
                [MEGAGPT, "train", *options, *self._words, f"train.max_steps={steps}"],
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def stop(self, number: int) -> None:
        """Ask it to save and end, as soon as it can be asked: it has started its launcher, or waits to do it again."""
        wait_until(lambda: self.below("deepspeed") or time.time() - psutil.Process(self.process.pid).create_time() > 60)
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


class Meter:
    """Open files and resident memory of processes, looked at once a second while the block runs."""

    def __init__(self, run_dir: Path, processes: Callable[[], list[psutil.Process]]) -> None:
        self._run_dir, self._processes = run_dir, processes
        self._seen: defaultdict[tuple[int, float], list[tuple[int, float]]] = defaultdict(list)
        """(pid, start) -> (open files, MiB) at each look."""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(1.0):
            with suppress(psutil.Error, OSError):  # one that has just ended, or was just removed
                saved_at = max(
                    (one.stat().st_mtime for one in self._run_dir.glob("checkpoints/step_????????")), default=0
                )
                for process in self._processes():
                    began = process.create_time()
                    if began < saved_at:
                        look = process.num_fds(), process.memory_info().rss / 2**20
                        self._seen[process.pid, began].append(look)

    def growth(self) -> list[tuple[int, float, int]]:
        """(files, MiB, looks) by which each process has grown that was looked at for ten seconds or more.

        The least of the last third against the least of the first: a save has its files open while it lasts.
        """
        found = []
        for looks in self._seen.values():
            third = len(looks) // 3
            if third >= 3:
                (files, mib), (files_then, mib_then) = (
                    tuple(min(one) for one in zip(*part, strict=True)) for part in (looks[-third:], looks[:third])
                )
                found.append((files - files_then, mib - mib_then, len(looks)))
        return found


def kill_a_rank(run: Watched, choose: random.Random) -> None:
    choose.choice(run.ranks()).kill()


def stop_a_rank(run: Watched, choose: random.Random) -> None:
    choose.choice(run.ranks()).suspend()


def kill_or_stop_a_rank_in_a_save(run: Watched, choose: random.Random) -> None:
    """While the folder that the save writes is there, and is not yet a checkpoint."""
    folder, ranks = run.run_dir / "checkpoints", run.ranks()
    fault = choose.choice(["kill", "suspend"])
    until = time.monotonic() + 10
    while not list(folder.glob("step_*.tmp")):
        if time.monotonic() > until:
            raise IndexError("nothing was saved")
        time.sleep(0.0005)
    getattr(choose.choice(ranks), fault)()


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


FAULTS = (
    kill_a_rank,
    stop_a_rank,
    kill_or_stop_a_rank_in_a_save,
    kill_the_launcher,
    kill_all_and_damage_the_newest_checkpoint,
    preempt,
)


def inject(run: Watched, minutes: float, choose: random.Random) -> Counter[str]:
    """Faults at random moments for so long; how many of each kind met a process."""
    injected: Counter[str] = Counter()
    deck: list[Callable[[Watched, random.Random], None]] = []  # each kind comes up as often as any other
    until = time.monotonic() + 60 * minutes
    while time.monotonic() < until:
        at = time.monotonic() + choose.uniform(2, 20)
        wait_until(lambda at=at: time.monotonic() > at or run.process.poll() is not None, 30)
        assert run.process.poll() is None, "the supervisor has ended"
        deck = deck or choose.sample(FAULTS, len(FAULTS))
        fault = deck[-1]
        before = published(run.run_dir)
        with suppress(IndexError, psutil.Error):  # nothing is running that could be hit just now
            fault(run, choose)
            injected[fault.__name__] += 1
            deck.pop()
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
    faulty = Meter(tmp_path / "run", lambda: [*run.ranks(), psutil.Process(run.process.pid)])
    try:
        with faulty:
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
    assert injected.total() < len(FAULTS) or set(injected) == {fault.__name__ for fault in FAULTS}
    words = run_words(tmp_path / "calm", tokens, *common, f"train.max_steps={steps}")
    group = start(train_command, 2, words, log=tmp_path / "calm.log")
    pids = [one.pid for one in group.processes]
    calm = Meter(tmp_path / "calm", lambda: [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)])
    with calm:
        group.finish(7200)
    assert files_of(run.run_dir, steps) == files_of(tmp_path / "calm", steps)
    assert rows(run.run_dir) == rows(tmp_path / "calm")
    nothing_is_left(run.run_dir, shared_memory)
    nothing_leaks(faulty.growth(), "under faults")
    assert len(calm.growth()) == 2, "its ranks lived too short to be looked at"
    nothing_leaks(calm.growth(), "without faults")
    events = [json.loads(line) for line in (run.run_dir / "events.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    damaged_ones_are_explained(run.run_dir, events, injected)
    spent = goodput(events, metrics)
    LOG.info(
        "%s; %d steps, %d restarts, goodput %.1f %%, %s",
        dict(injected),
        steps,
        spent.restarts,
        100 * spent.fraction,
        spent.lost,
    )
    assert spent.fraction > LEAST_GOODPUT
    assert sum(spent.lost.values()) + spent.useful == pytest.approx(spent.wall)


def nothing_leaks(growth: list[tuple[int, float, int]], when: str) -> None:
    """No process has kept files open, or memory."""
    LOG.info("%s: (open files, MiB, seconds) that processes have grown by: %s", when, growth)
    assert max((files for files, _, _ in growth), default=0) <= MOST_FILES_MORE
    assert max((mib for _, mib, _ in growth), default=0) <= MOST_MIB_MORE


def damaged_ones_are_explained(run_dir: Path, events: list[dict[str, Any]], injected: Counter[str]) -> None:
    """Each checkpoint that was set aside was damaged by us, and the history has it.

    (A fault may hit between the renaming and the line in the history, and two damages the same checkpoint.)
    """
    folders = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*.damaged*"))
    told = [event["step"] for event in events if event["event"] == "set_aside"]
    LOG.info("set aside: %s, told: %s", folders, told)
    assert len(told) <= len(folders) <= injected["kill_all_and_damage_the_newest_checkpoint"]
    assert Counter(told) <= Counter(int(name.removeprefix("step_").partition(".")[0]) for name in folders)


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
