"""A thread that ends a process which waits for ever, and says for whom.

Every rank has one. It knows in which phase the main thread is and since when; past the phase's deadline, or when a
neighbour has died or another rank raises the alarm, it writes the stacks of all threads, tells the others where its
main thread is, hears where theirs are, names the rank that did not arrive, and ends the process: a main thread that
waits in a collective cannot. A rank that is stopped, or holds the interpreter's lock in foreign code, has no such
thread any more: the others name it, and those on its host kill it where it is stopped.
"""

from __future__ import annotations

import faulthandler
import os
import re
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import psutil
from torch._C._distributed_c10d import Store

from megagpt.config.schema import WatchSection
from megagpt.errors import MegaGPTError, TrainingHung
from megagpt.train.beats import BEAT_SECONDS, Beats, Member, Report
from megagpt.train.events import log_event
from megagpt.train.stacks import Place, dump_stacks, main_thread_place, place_of
from megagpt.train.stop import LAUNCHER_GONE, STOPPED
from megagpt.train.verdict import Verdict, judge, lost

Phase = Literal["startup", "step", "save", "eval"]

STEP_FLOOR_SECONDS = 180.0
"""Shortest learned deadline of a step. Source: NVIDIA's resiliency extension in Megatron-LM, section `step`."""
STEP_FACTOR = 10
"""Learned deadline of a step, in medians of the last ones."""
_LEARNING_STEPS = 5
"""Steps that are under the start-up's deadline, where the step's is to be learned."""
_LOOK_SECONDS = 0.5
_GRACE_SECONDS = 0.5
"""For the main thread, which mostly sees an error of its own when another rank has died."""
_HOLD_SECONDS = 1.5
"""Longest that rank 0 keeps the store for the others at the end."""
_FAILED_WRITER_SECONDS = 2.5 * BEAT_SECONDS
"""For what made its collectives fail to be seen: a rank that has died is the better answer."""
_MARGIN_SECONDS = 60
"""That a collective waits longer than the deadline that it is under."""
_REPORT_SECONDS = 2.5
"""Longest that the ranks wait for each other's reports."""
_BACKUP_SECONDS = 4.0
"""After a deadline, for this thread; then the interpreter's own timer ends the process with exit code 1."""
_NO_TIMEOUT = timedelta(days=7)
"""Where the user wants no deadline."""
_STDERR = 2
"""Its descriptor, whatever Python has put in its place."""
_LAST_SECONDS = 20.0
"""For telling what happened."""
_COLLECTIVE_ERROR = re.compile("gloo|nccl|connection|socket|peer|broken pipe|store", re.IGNORECASE)


def collective_timeout(watch: WatchSection, usual: timedelta) -> timedelta:
    """When the process group itself gives up: after every deadline, so that ours can say more."""
    deadlines = [watch.startup_seconds, watch.step_seconds or 0.0, watch.save_seconds, watch.eval_seconds]
    if 0.0 in (watch.startup_seconds, watch.step_seconds, watch.save_seconds, watch.eval_seconds):
        return _NO_TIMEOUT
    return max(usual, timedelta(seconds=max(deadlines) + _MARGIN_SECONDS))


def save_timeout(watch: WatchSection) -> timedelta:
    """When the group of the threads that write checkpoints gives up: after their deadline."""
    return timedelta(seconds=watch.save_seconds + _MARGIN_SECONDS) if watch.save_seconds else _NO_TIMEOUT


@dataclass(frozen=True, slots=True)
class _Writer:
    """The thread that writes a checkpoint while training goes on."""

    step: int
    since: float
    thread: int
    failure: str = ""
    """Why it cannot agree with those of the other ranks any more."""


class Watch:
    """The watch over one process. Use it as a context: an error that leaves it is made known to the other ranks.

    Args:
        settings: deadlines.
        run_dir: stacks and events go here.
        rank: this process's.
        end: how the process is ended.
        launcher_gone: asked while there is nothing to save, as during the start; the process ends where it is true.
        saves: a main thread past the start sees by itself that its launcher has gone, and saves first.
    """

    def __init__(
        self,
        settings: WatchSection,
        run_dir: Path,
        rank: int,
        end: Callable[[int], object] = os._exit,
        launcher_gone: Callable[[], bool] = lambda: False,
        *,
        saves: bool = True,
    ) -> None:
        self._settings, self._run_dir, self._rank, self._end = settings, run_dir, rank, end
        self._launcher_gone, self._saves = launcher_gone, saves
        self._now: tuple[Phase, int, str, float] = ("startup", 0, "", time.monotonic())
        self._marks = 0
        self._writer: _Writer | None = None
        self._about_writer = False
        """The alarm is about that thread, not the main one."""
        self._step_seconds: deque[float] = deque(maxlen=64)
        self._members: Sequence[Member] = ()
        self._neighbours: list[tuple[Member, psutil.Process]] = []
        self._beats: Beats | None = None
        self._alarm_lock = threading.Lock()
        self._closed = threading.Event()
        self._trouble_since: float | None = None
        self._unable_then: dict[int, str] = {}
        self._armed_until = 0.0
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, RuntimeError | OSError) and _COLLECTIVE_ERROR.search(str(error)) and self._has_lost_one():
            self._alarm(f"{type(error).__name__} in a collective")
        if isinstance(error, TrainingHung):  # of a save beside training
            self._about_writer = True
            self._alarm(str(error))
        if self._beats is not None:
            cause = _cause(error)
            if cause:
                # One that all ranks raise together ends them by itself; where it does not, they must hear of it.
                grace = 10.0 if isinstance(error, MegaGPTError) else _GRACE_SECONDS
                self._beats.raise_alarm(f"rank {self._rank} ended: {cause}", grace)
            self._beats.say_end(cause)
            if self._rank == 0:
                self._hold_store()
        self._close()

    def join(self, store: Store, members: Sequence[Member]) -> None:
        """The process group is there: from now on the ranks hear of each other."""
        self._members = members
        seen = [(member, member.process()) for member in members if member.rank != self._rank]
        self._neighbours = [(member, process) for member, process in seen if process is not None]
        self._beats = Beats(store, self._rank, len(members))

    def enter(self, phase: Phase, step: int, doing: str = "") -> None:
        """The main thread comes to a phase, or to another part of it; all ranks in the same order.

        Args:
            phase: whose deadline counts from here; a part of the phase and step that it is in goes on with it.
            step: the step that is being made, saved or evaluated.
            doing: the part, for messages.
        """
        old_phase, old_step, _, since = self._now
        self._marks += 1
        if (phase, step) != (old_phase, old_step):
            now = time.monotonic()
            if old_phase == "step":
                self._step_seconds.append(now - since)
            since = now
        self._now = (phase, step, doing, since)

    @contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """Around the work of a thread that writes a checkpoint beside training: `watch.save_seconds` are its own.

        An error that leaves it is one of its collectives; without them the ranks cannot agree on the checkpoint, and
        all of them end. All else that can go wrong with a save is told and the run goes on (`checkpoint.saver`).

        Args:
            step: of the checkpoint.
        """
        self._writer = writer = _Writer(step, time.monotonic(), threading.get_ident())
        try:
            yield
        except Exception as error:
            self._writer = _Writer(step, writer.since, writer.thread, _cause(error))
            raise
        self._writer = None

    def deadline(self, phase: Phase) -> float:
        """Seconds that the phase may last now; 0 for ever."""
        settings = self._settings
        if phase != "step":
            return {"startup": settings.startup_seconds, "save": settings.save_seconds, "eval": settings.eval_seconds}[
                phase
            ]
        if settings.step_seconds is not None:
            if self._step_seconds or not settings.step_seconds:
                return settings.step_seconds
            return max(settings.step_seconds, settings.startup_seconds) if settings.startup_seconds else 0.0
        if len(self._step_seconds) < _LEARNING_STEPS:
            return settings.startup_seconds
        return max(STEP_FLOOR_SECONDS, STEP_FACTOR * statistics.median(list(self._step_seconds)))

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            phase, step, _, _ = self._now
            if (phase == "startup" or not self._saves) and self._launcher_gone():
                when = _in_words(phase, step)
                sys.stderr.write(f"rank {self._rank}: {LAUNCHER_GONE} during {when}; nothing was to be saved\n")
                self._kill_stopped([process for _, process in self._neighbours])
                self._end(STOPPED)
            reason = self._overdue() or self._writer_overdue() or self._trouble()
            if reason:
                self._alarm(reason)

    def _overdue(self) -> str:
        phase, step, _, since = self._now
        deadline, spent = self.deadline(phase), time.monotonic() - since
        self._arm_backup(deadline, spent)
        if not deadline or spent <= deadline:
            return ""
        key = "watch.startup_seconds" if phase == "step" and not self._step_seconds else f"watch.{phase}_seconds"
        return f"{_in_words(phase, step)} is not done after {spent:.0f} s (limit {deadline:.0f} s, {key})"

    def _writer_overdue(self) -> str:
        writer, limit = self._writer, self._settings.save_seconds
        if writer is None or writer.failure or not limit or time.monotonic() - writer.since <= limit:
            return ""
        self._about_writer = True
        spent = time.monotonic() - writer.since
        return (
            f"save at step {writer.step} is not written after {spent:.0f} s (limit {limit:.0f} s, watch.save_seconds)"
        )

    def _arm_backup(self, deadline: float, spent: float) -> None:
        """The interpreter's timer needs no lock that another thread may hold for ever. Set anew once in a while."""
        now = time.monotonic()
        if now < self._armed_until:
            return
        self._armed_until = now + BEAT_SECONDS
        if deadline:
            faulthandler.dump_traceback_later(
                max(0.0, deadline - spent) + _BACKUP_SECONDS + _REPORT_SECONDS, exit=True, file=_STDERR
            )
        else:
            faulthandler.cancel_dump_traceback_later()

    def _trouble(self) -> str:
        """Why the run must end though no deadline of this rank has passed: after a grace, for it may end by itself."""
        reason, grace = self._others()
        if not reason:
            self._trouble_since, self._unable_then = None, {}
            return ""
        if self._trouble_since is None:
            self._trouble_since = time.monotonic()
            self._unable_then = self._unable()  # later also those are gone that have seen it sooner
        return reason if time.monotonic() - self._trouble_since >= grace else ""

    def _others(self) -> tuple[str, float]:
        beats = self._beats
        if beats is None:
            return "", 0.0
        if beats.alarm is not None:
            self._about_writer = bool(beats.alarm["writer"])
            return str(beats.alarm["reason"]), float(beats.alarm["grace"])
        gone = self._gone()
        if gone:
            return f"{' and '.join(str(member) for member in gone)} ended while others went on", _GRACE_SECONDS
        writer = self._writer
        if writer is not None and writer.failure:
            self._about_writer = True
            return f"save at step {writer.step}: the ranks cannot agree on it any more", _FAILED_WRITER_SECONDS
        limit = self._settings.silent_seconds
        if limit and beats.silent_for() > limit and not _goes_on(self._host_of_store()):
            words = f"the store of the process group, in rank 0 or its launcher, has not answered for {limit:.0f} s"
            return f"{words} (limit {limit:.0f} s, watch.silent_seconds)", _GRACE_SECONDS
        if limit and beats.quiet_seconds > limit and beats.next not in beats.ends([beats.next]):
            words = f"rank {beats.next} has given no sign of life for {beats.quiet_seconds:.0f} s"
            return f"{words} (limit {limit:.0f} s, watch.silent_seconds)", _GRACE_SECONDS
        return "", 0.0

    def _host_of_store(self) -> psutil.Process | None:
        if self._rank == 0:  # where its own thread is slow to ask, the store is not gone
            return psutil.Process()
        return next((process for member, process in self._neighbours if member.rank == 0), None)

    def _gone(self) -> list[Member]:
        """Neighbours that have died without saying so."""
        gone = [member for member, process in self._neighbours if not _alive(process)]
        if not gone or self._beats is None:
            return []
        said = self._beats.ends([member.rank for member in gone])
        return [member for member in gone if said.get(member.rank) != ""]

    def _hold_store(self) -> None:
        """Wait until the others have said that they end too: they would miss a store that is gone."""
        others = [member.rank for member in self._members if member.rank != self._rank]
        until = time.monotonic() + _HOLD_SECONDS
        while self._beats is not None and time.monotonic() < until and len(self._beats.ends(others)) < len(others):
            time.sleep(0.02)

    def _has_lost_one(self) -> bool:
        """Has a rank died, or does one give no sign of life? Asked when a collective has failed."""
        if self._beats is None:
            return False
        until, first = time.monotonic() + 2.2 * BEAT_SECONDS, self._beats.counts()
        while time.monotonic() < until:
            if self._gone() or self._beats.alarm is not None:
                return True
            time.sleep(0.1)
        now = self._beats.counts()
        return not now or any(now.get(rank) == count for rank, count in first.items() if rank != self._rank)

    def _alarm(self, reason: str) -> None:
        """Gather what is known, tell it, and end the process. Whoever comes second waits here for the end."""
        with self._alarm_lock:
            try:
                self._find_and_tell(reason)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                self._end(TrainingHung.exit_code)

    def _find_and_tell(self, reason: str) -> None:
        faulthandler.dump_traceback_later(_LAST_SECONDS, exit=True, file=_STDERR)
        unable = self._unable_then or self._unable()  # before anybody hears of us, and kills them
        phase, step, doing, _ = self._now
        folder = self._run_dir / "stacks"
        place, writer = main_thread_place(), self._writer
        writes = _place_of_writer(writer)
        try:
            dump_stacks(folder, self._rank, reason)
        except OSError as error:  # a full disk: the run ends all the same
            sys.stderr.write(f"{folder}: no stacks: {error}\n")
        words = _in_words(phase, step, doing)
        own = Report(self._rank, self._marks, words, place.where, place.waits, writes.where, writes.waits)
        reports = self._exchange(reason, own, unable)
        heard = set(reports)
        if self._beats is not None and self._beats.lost:  # each of this host speaks for itself alone
            heard = {self._rank, *(member.rank for member, _ in self._neighbours)} - unable.keys()
        verdict = self._verdict(reports, unable)
        if not any(member.rank in heard for member, _ in self._neighbours if member.rank < self._rank):
            self._tell(reason, reports, verdict)
        if self._rank == min(heard):
            self._log(reason, verdict)
        self._kill_stopped([process for member, process in self._neighbours if member.rank in unable])
        if self._rank == 0 and self._beats is not None:
            time.sleep(BEAT_SECONDS)  # it holds the store, which the others may still read

    @staticmethod
    def _kill_stopped(processes: Sequence[psutil.Process]) -> None:
        """What cannot end itself: a stopped process takes no signal but this one, and launchers give up before."""
        for process in processes:
            if _status(process) == psutil.STATUS_STOPPED:
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def _unable(self) -> dict[int, str]:
        """Neighbours that cannot report, and why."""
        found = {
            member.rank: f"{member} did not arrive: it is stopped by a signal"
            for member, process in self._neighbours
            if _status(process) == psutil.STATUS_STOPPED
        }
        gone = self._gone()
        causes = self._beats.ends([member.rank for member in gone]) if gone and self._beats is not None else {}
        for member in gone:
            cause = causes.get(member.rank)
            found[member.rank] = f"{member} ended: {cause}" if cause else f"{member} has died"
        return found

    def _exchange(self, reason: str, own: Report, unable: dict[int, str]) -> dict[int, Report]:
        """The reports of all ranks that still can: they come within a beat of the alarm."""
        reports, beats = {self._rank: own}, self._beats
        if beats is None:
            return reports
        beats.lost = beats.lost or 0 in unable  # it holds the store
        beats.raise_alarm(reason, 0.0, writer=self._about_writer)
        beats.report(own)
        until = time.monotonic() + _REPORT_SECONDS
        awaited = {member.rank for member in self._members} - unable.keys()
        while not awaited <= reports.keys() and time.monotonic() < until and not beats.lost:
            reports |= beats.reports()
            time.sleep(0.05)
        if beats.lost:
            time.sleep(_GRACE_SECONDS + _LOOK_SECONDS + 0.5)  # the others come to the same without hearing of us
        return reports

    def _tell(self, reason: str, reports: dict[int, Report], verdict: Verdict) -> None:
        others = sorted(reports.keys() - set(verdict.ranks))
        lines = [
            f"error: {reason}; {verdict}. Stacks of the ranks that could write them: "
            f"{self._run_dir / 'stacks'}. The last checkpoint stands",
            *(f"  rank {rank}: {reports[rank].doing}, at {reports[rank].where}" for rank in others[:8]),
        ]
        sys.stderr.write("\n".join(lines) + "\n")

    def _log(self, reason: str, verdict: Verdict) -> None:
        try:
            log_event(self._run_dir, "hung", self._now[1], reason=reason, ranks=verdict.ranks, verdict=str(verdict))
        except OSError as error:
            sys.stderr.write(f"{self._run_dir}: event not written: {error}\n")

    def _verdict(self, reports: dict[int, Report], unable: dict[int, str]) -> Verdict:
        """Ranks that cannot report are the cause; then those that did not, those behind, those that do not wait."""
        if unable:
            return Verdict(sorted(unable.items()))
        missing = [member for member in self._members if member.rank not in reports]
        beats = self._beats
        if beats is not None and beats.lost:  # whom this host sees is well; of the others nothing can be heard
            near = {member.rank for member, process in self._neighbours if _alive(process)}
            missing = [member for member in missing if member.rank not in near] or missing
        if missing:
            return lost(missing, beats.ends([member.rank for member in missing]) if beats is not None else {})
        return judge(reports, self._members, writer=self._about_writer)

    def _close(self) -> None:
        self._closed.set()
        self._thread.join(_LOOK_SECONDS)
        faulthandler.cancel_dump_traceback_later()
        if self._beats is not None:
            self._beats.close()


def _place_of_writer(writer: _Writer | None) -> Place:
    """In words; empty where there is none."""
    if writer is None:
        return Place("", waits=False)
    if writer.failure:
        return Place(f"its collectives failed: {writer.failure}", waits=False)
    place = place_of(writer.thread)
    return Place(f"writing, at {place.where}", place.waits)


def _cause(error: BaseException | None) -> str:
    """In one line; nothing where a process ends as it should, or by Ctrl-C."""
    if not isinstance(error, Exception):
        return ""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _in_words(phase: Phase, step: int, doing: str = "") -> str:
    of_step = {"startup": "the start", "step": f"step {step}"}.get(phase, f"{phase} at step {step}")
    return f"{of_step} ({doing})" if doing else of_step


def _alive(process: psutil.Process | None) -> bool:
    return process is not None and _status(process) not in (None, psutil.STATUS_ZOMBIE)


def _goes_on(process: psutil.Process | None) -> bool:
    return process is not None and _status(process) not in (None, psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)


def _status(process: psutil.Process) -> str | None:
    """None for a process that is gone, or whose number another one has."""
    try:
        return str(process.status()) if process.is_running() else None
    except psutil.Error:
        return None
