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
from collections.abc import Callable, Sequence
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
from megagpt.train.stacks import dump_stacks, main_thread_place

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
_STORE_SECONDS = 30.0
"""Without an answer of a store on another host."""
_REPORT_SECONDS = 2.5
"""Longest that the ranks wait for each other's reports."""
_BACKUP_SECONDS = 4.0
"""After a deadline, for this thread; then the interpreter's own timer ends the process with exit code 1."""
_STDERR = 2
"""Its descriptor, whatever Python has put in its place."""
_LAST_SECONDS = 20.0
"""For telling what happened."""
_COLLECTIVE_ERROR = re.compile("gloo|nccl|connection|socket|peer|broken pipe|store", re.IGNORECASE)


def collective_timeout(watch: WatchSection, usual: timedelta) -> timedelta:
    """When the process group itself gives up: after every deadline, so that ours can say more."""
    deadlines = [watch.startup_seconds, watch.step_seconds or 0.0, watch.save_seconds, watch.eval_seconds]
    if 0.0 in (watch.startup_seconds, watch.step_seconds, watch.save_seconds, watch.eval_seconds):
        return timedelta(days=7)  # the user wants no deadline
    return max(usual, timedelta(seconds=max(deadlines) + 60))


class Watch:
    """The watch over one process. Use it as a context: an error that leaves it is made known to the other ranks.

    Args:
        settings: deadlines.
        run_dir: stacks and events go here.
        rank: this process's.
        end: how the process is ended.
    """

    def __init__(
        self, settings: WatchSection, run_dir: Path, rank: int, end: Callable[[int], object] = os._exit
    ) -> None:
        self._settings, self._run_dir, self._rank, self._end = settings, run_dir, rank, end
        self._now: tuple[Phase, int, str, float] = ("startup", 0, "", time.monotonic())
        self._marks = 0
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
            reason = self._overdue() or self._trouble()
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
            return str(beats.alarm["reason"]), float(beats.alarm["grace"])
        gone = self._gone()
        if gone:
            return f"{' and '.join(str(member) for member in gone)} ended while others went on", _GRACE_SECONDS
        if beats.silent_for() > _STORE_SECONDS and not _alive(self._host_of_store()):
            return "the store of the process group, in rank 0 or its launcher, is gone", _GRACE_SECONDS
        return "", 0.0

    def _host_of_store(self) -> psutil.Process | None:
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
        place = main_thread_place()
        try:
            dump_stacks(folder, self._rank, reason)
        except OSError as error:  # a full disk: the run ends all the same
            sys.stderr.write(f"{folder}: no stacks: {error}\n")
        own = Report(self._rank, self._marks, _in_words(phase, step, doing), place.where, place.waits)
        reports = self._exchange(reason, own, unable)
        heard = set(reports)
        if self._beats is not None and self._beats.lost:  # each of this host speaks for itself alone
            heard = {self._rank, *(member.rank for member, _ in self._neighbours)} - unable.keys()
        blamed = self._blamed(reports, unable)
        if not any(member.rank in heard for member, _ in self._neighbours if member.rank < self._rank):
            self._tell(reason, reports, blamed)
        if self._rank == min(heard):
            self._log(reason, blamed)
        for member, process in self._neighbours:
            # What cannot end itself: a stopped process takes no signal but this one, and launchers give up before.
            if member.rank in unable and _status(process) == psutil.STATUS_STOPPED:
                process.kill()
        if self._rank == 0 and self._beats is not None:
            time.sleep(BEAT_SECONDS)  # it holds the store, which the others may still read

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
        beats.raise_alarm(reason, 0.0)
        beats.report(own)
        until = time.monotonic() + _REPORT_SECONDS
        awaited = {member.rank for member in self._members} - unable.keys()
        while not awaited <= reports.keys() and time.monotonic() < until and not beats.lost:
            reports |= beats.reports()
            time.sleep(0.05)
        if beats.lost:
            time.sleep(_GRACE_SECONDS + _LOOK_SECONDS + 0.5)  # the others come to the same without hearing of us
        return reports

    def _tell(self, reason: str, reports: dict[int, Report], blamed: Sequence[tuple[int, str]]) -> None:
        others = sorted(reports.keys() - {rank for rank, _ in blamed})
        lines = [
            f"error: {reason}; {_verdict(blamed)}. Stacks of the ranks that could write them: "
            f"{self._run_dir / 'stacks'}. The last checkpoint stands",
            *(f"  rank {rank}: {reports[rank].doing}, at {reports[rank].where}" for rank in others[:8]),
        ]
        sys.stderr.write("\n".join(lines) + "\n")

    def _log(self, reason: str, blamed: Sequence[tuple[int, str]]) -> None:
        try:
            log_event(
                self._run_dir,
                "hung",
                self._now[1],
                reason=reason,
                ranks=[rank for rank, _ in blamed],
                verdict=_verdict(blamed),
            )
        except OSError as error:
            sys.stderr.write(f"{self._run_dir}: event not written: {error}\n")

    def _blamed(self, reports: dict[int, Report], unable: dict[int, str]) -> list[tuple[int, str]]:
        """Ranks that did not arrive, and why: those that cannot report, those behind, those that do not wait."""
        if unable:
            return sorted(unable.items())
        missing = [member for member in self._members if member.rank not in reports]
        if missing:
            causes = self._beats.ends([member.rank for member in missing]) if self._beats is not None else {}
            return [(member.rank, _silent(member, causes.get(member.rank))) for member in missing]
        furthest = max(report.mark for report in reports.values())
        behind = [report for report in reports.values() if report.mark < furthest]
        if not behind:
            behind = [report for report in reports.values() if not report.waits]
        if len(behind) == len(reports) > 1:
            return []
        return [(report.rank, self._place(report)) for report in sorted(behind, key=lambda report: report.rank)]

    def _place(self, report: Report) -> str:
        who = next((str(member) for member in self._members if member.rank == report.rank), f"rank {report.rank}")
        return f"{who} did not arrive: {report.doing}, at {report.where}"

    def _close(self) -> None:
        self._closed.set()
        self._thread.join(_LOOK_SECONDS)
        faulthandler.cancel_dump_traceback_later()
        if self._beats is not None:
            self._beats.close()


def _cause(error: BaseException | None) -> str:
    """In one line; nothing where a process ends as it should, or by Ctrl-C."""
    if not isinstance(error, Exception):
        return ""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _verdict(blamed: Sequence[tuple[int, str]]) -> str:
    return " and ".join(words for _, words in blamed) or "all ranks wait for each other, or for a device"


def _silent(member: Member, cause: str | None) -> str:
    return f"{member} ended: {cause}" if cause else f"{member} did not arrive and gives no sign of life"


def _in_words(phase: Phase, step: int, doing: str = "") -> str:
    of_step = {"startup": "the start", "step": f"step {step}"}.get(phase, f"{phase} at step {step}")
    return f"{of_step} ({doing})" if doing else of_step


def _alive(process: psutil.Process | None) -> bool:
    return process is not None and _status(process) not in (None, psutil.STATUS_ZOMBIE)


def _status(process: psutil.Process) -> str | None:
    """None for a process that is gone, or whose number another one has."""
    try:
        return str(process.status()) if process.is_running() else None
    except psutil.Error:
        return None
