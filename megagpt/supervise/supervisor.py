"""`megagpt train --restarts N`: start the launcher again after a failure, on the hosts that are there.

A run goes on from its newest checkpoint by itself; what is done here is only to notice that it ended, to see that
nothing of it is left, to leave out hosts that do not answer, and to say why and how often it was started. What may pass
(a folder that cannot be read just now, too few hosts, a full disk) is a failure like others: it is tried again, with
the same patience. Only what the user has to mend ends the run at once.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megagpt.checkpoint.open import CHECKPOINTS
from megagpt.checkpoint.store import CheckpointStore
from megagpt.errors import MegaGPTError, RunBusy, SaveFailed, SystemFailed, TrainingDiverged, TrainingHung, of_system
from megagpt.supervise.leftovers import clear_away
from megagpt.train.events import count_ends, log_event
from megagpt.train.stop import STOPPED

FINAL_CODES = (MegaGPTError.exit_code, TrainingDiverged.exit_code)
"""The same command would end with them again: what it says is to be mended first."""

_CAUSES = {
    0: "the launcher ended without an error, but the run is not done: a process of the launcher was killed",
    1: "a process ended with an error of the program; its traceback stands above",
    RunBusy.exit_code: "another process trains in the run's folder",
    TrainingHung.exit_code: "a rank hung or was lost",
    SaveFailed.exit_code: "the last save failed",
    SystemFailed.exit_code: "a disk, the network or a host did not do what it was asked; its words stand above",
}
_ASK_AGAIN_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Patience:
    """How often and how fast to start again."""

    restarts: int
    """In a row, with no new checkpoint between them; after one failure more the run is given up."""
    first_wait_seconds: float = 5.0
    """Before the first restart; twice as long before each further one that comes without progress."""
    longest_wait_seconds: float = 300.0
    grace_seconds: float = 60.0
    """For processes that are left over to save and end by themselves, before they are killed; see `leftovers`."""

    def wait_seconds(self, failures: int) -> float:
        """Before the next start, after so many failures in a row."""
        return min(self.first_wait_seconds * 2.0 ** (failures - 1), self.longest_wait_seconds)


@dataclass(frozen=True, slots=True)
class _Seen:
    """How far the run has come."""

    step: int = 0
    """Of its newest checkpoint."""
    ends: int = 0
    """How often it has said that it is over."""


@dataclass(frozen=True, slots=True)
class _Attempt:
    """How one start ended."""

    code: int
    cause: str
    before: _Seen
    after: _Seen

    @property
    def progressed(self) -> bool:
        """Whether it left a new checkpoint."""
        return self.after.step > self.before.step


class Supervisor:
    """Starts one run until it has ended well, was asked to stop, or fails without getting anywhere.

    Args:
        run_dir: of the run.
        command: gives the words that start the launcher; asked before each start, so that they may name other hosts.
        environment: of the launcher.
        patience: see there.
        say: shows a line to the user.
        last_step: of the run; at its checkpoint the run is done.
    """

    def __init__(
        self,
        run_dir: Path,
        command: Callable[[], Sequence[str]],
        environment: Mapping[str, str],
        patience: Patience,
        say: Callable[[str], object],
        last_step: int,
    ) -> None:
        self._run_dir = run_dir
        self._last_step = last_step
        self._store = CheckpointStore(run_dir / CHECKPOINTS)
        self._command = command
        self._environment = environment
        self._patience = patience
        self._say = say
        self._launcher: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._seen = _Seen()
        self._impatient = False
        """Ctrl-C was said twice."""

    def run(self) -> int:
        """Start, wait, start again; the exit code for the shell.

        Raises:
            MegaGPTError: no command can be made, whichever hosts answer.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)
        failures = 0
        while True:
            end = self._try()
            code = end.code
            if self._stopping:
                return 0 if end.progressed or code == 0 else STOPPED
            if (code == 0 and self._has_ended(end)) or code in FINAL_CODES:
                return code
            failures = 1 if end.progressed else failures + 1
            log_event(self._run_dir, "failed", self._seen.step, exit_code=code, cause=end.cause)
            if failures > self._patience.restarts:
                self._say(
                    f"{self._run_dir}: given up after {failures} failures in a row without a new checkpoint; "
                    f"the last one: {end.cause}"
                )
                return max(code, 1) if code >= 0 else 128 - code
            if self._asked_to_stop_while_waiting(end.cause, failures):
                return STOPPED

    def _has_ended(self, end: _Attempt) -> bool:
        """Whether the run itself says so.

        The exit code alone does not: DeepSpeed 0.19.8's `deepspeed` also ends with 0 where the process that it started
        was killed (launcher/runner.py takes only positive codes for failures).
        """
        return end.after.step >= self._last_step or end.after.ends > end.before.ends

    def _try(self) -> _Attempt:
        """Run the launcher once; what keeps it from being started is how the attempt ended, where it may pass.

        Raises:
            MegaGPTError: it may not.
        """
        before = self._seen
        try:
            before = self._look()
            code = self._attempt()
        except (OSError, MegaGPTError) as error:
            told = of_system(error) if isinstance(error, OSError) else error
            if told.exit_code in FINAL_CODES:
                raise told from None
            return _Attempt(told.exit_code, str(told), before, before)
        after = before
        try:
            after = self._look()
        except (OSError, MegaGPTError) as error:
            self._say(f"how far the run has come cannot be seen: {error}")
        return _Attempt(code, cause_of(code), before, after)

    def _look(self) -> _Seen:
        """How far the run has come.

        Raises:
            MegaGPTError, OSError: that cannot be told just now.
        """
        found = self._store.survey()
        found.check_newest_readable(self._store.folder)
        if self._seen.step and not found.steps:
            raise SystemFailed(
                f"{self._store.folder}: step {self._seen.step} was here, and now there is no checkpoint; is its disk "
                "mounted?"
            )
        self._seen = _Seen(found.steps[-1] if found.steps else 0, count_ends(self._run_dir))
        return self._seen

    def _attempt(self) -> int:
        """Run the launcher once, and leave none of its processes behind; its exit code, negative for a signal."""
        words = list(self._command())
        # A session of its own: whatever the launcher starts on this host can be found again, also when it has died.
        self._launcher = subprocess.Popen(words, env=dict(self._environment), start_new_session=True)
        if self._stopping:  # the signal came while it was being started
            self._launcher.terminate()
        code = self._launcher.wait()
        self._clear_away(self._launcher.pid)
        return code

    def _clear_away(self, session: int) -> None:
        def grace() -> float:
            return 0.0 if self._impatient else self._patience.grace_seconds

        clear_away(session, self._run_dir / CHECKPOINTS, grace, self._say)

    def _asked_to_stop_while_waiting(self, cause: str, failures: int) -> bool:
        seconds = self._patience.wait_seconds(failures)
        self._say(
            f"{self._run_dir}: {cause}; starting again in {seconds:.0f} s from "
            + (f"step {self._seen.step}" if self._seen.step else "the beginning")
            + f" ({failures} of {self._patience.restarts} without a new checkpoint)"
        )
        until = time.monotonic() + seconds
        while not self._stopping and time.monotonic() < until:
            time.sleep(_ASK_AGAIN_SECONDS)
        return self._stopping

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - signal's signature
        """Ask the run to save and stop: its processes do when their launcher has gone."""
        self._impatient = self._impatient or (self._stopping and number == signal.SIGINT)
        self._stopping = True
        if self._launcher is not None and self._launcher.poll() is None:
            self._launcher.terminate()


def cause_of(code: int) -> str:
    """What an exit code of the launcher says to a person."""
    if code < 0:
        return f"the launcher was ended by {_signal_name(-code)}"
    if code in _CAUSES:
        return _CAUSES[code]
    for number in (256 - code, code - 128):  # as deepspeed passes on a rank's end by a signal, and as a shell does
        if number in signal.valid_signals():
            return f"a process was ended by {_signal_name(number)}"
    return f"the launcher ended with exit code {code}"


def _signal_name(number: int) -> str:
    names = {int(one): one.name for one in signal.Signals}
    return names.get(number, f"signal {number}")
