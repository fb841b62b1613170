"""When a run saves, in which thread, and what happens when that fails.

With `checkpoint.asynchronous` a save copies this rank's values into host memory, and a thread of its own writes them,
makes them durable and publishes the checkpoint, while training goes on. The threads of all ranks agree with each other
over a gloo group that nothing else uses: collectives of two threads in one group would meet in another order on each
rank. Messages in files of the staging folder would need no group, but a rank whose disk is full could not leave one,
other hosts see files late, and nobody would notice a rank that has died; gloo tells that at once.

A save that fails is told, undone and tried again; it does not end a run. Older checkpoints go when the new one has been
read back from the disk; only where there is no room for it does the oldest go before, as far as retention allows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from megagpt.checkpoint.host_copy import HostCopy
from megagpt.checkpoint.save import Identity, Written, make_room, prune_checkpoints, write_checkpoint
from megagpt.checkpoint.store import CheckpointStore
from megagpt.checkpoint.tensors import RankFile, TensorSlice
from megagpt.config.schema import CheckpointSection
from megagpt.errors import CheckpointError, NoRoom, SaveFailed, TrainingHung
from megagpt.parallel.mesh import Mesh

LAST_ATTEMPTS = 3
"""How often the last save of a run is tried."""
SECONDS_BETWEEN = 1.0
"""Before the last save is tried again."""


class Tell(Protocol):
    """Where a save's story goes; on all ranks but the main one, nowhere."""

    def say(self, message: str) -> None:
        """A line for a person."""

    def event(self, name: str, step: int, **details: Any) -> None:
        """A line of the run's history."""

    def make_durable(self) -> None:
        """Called before each checkpoint is written: what the run has recorded up to it must survive a power cut."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a save ended, the same on every rank."""

    step: int
    seconds: float
    """From the copy to the end, on this rank."""
    failure: str | None = None
    """Why there is no checkpoint."""
    not_removed: str | None = None
    """Why older checkpoints, or what is left of other saves, are still there."""
    set_aside: str | None = None
    """What stood in the way and was no checkpoint."""
    made_room: tuple[int, ...] = ()
    """Steps of the older checkpoints that were removed before this one was there."""


class Saver:
    """The saves of one run. Every rank calls the same methods at the same steps.

    Use as a context manager: at its end, also after an error, the save under way is waited for.

    Args:
        store: where checkpoints go.
        mesh: this process's place.
        settings: how often, how, and what is kept.
        identity: what every checkpoint says about the run.
        slices: this rank's part of the state as it is when it is called.
        tell: where it says what it does.
        timeout: a rank that keeps the others waiting longer ends the run.
        watched: around the thread's work on the checkpoint of a step: sees how long it takes, and what it raises.
    """

    def __init__(
        self,
        store: CheckpointStore,
        mesh: Mesh,
        settings: CheckpointSection,
        identity: Identity,
        slices: Callable[[], Iterable[TensorSlice]],
        tell: Tell,
        timeout: timedelta = timedelta(minutes=30),
        watched: Callable[[int], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._store, self._mesh, self._settings, self._identity = store, mesh, settings, identity
        self._slices, self._tell, self._watched = slices, tell, watched
        self._channel = _own_channel(mesh, timeout) if settings.asynchronous else mesh
        self._copy: HostCopy | None = None
        if settings.asynchronous:
            self._copy = copy = HostCopy(mesh.device)
            mesh.together(lambda: copy.reserve(slices()))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._running: Future[Outcome] | None = None
        self._step = 0
        """Of the save under way."""
        self._started_at = 0.0
        self._waited: float | None = None
        """Seconds that training waited for the save under way; None for one whose end it waits for."""
        self._look_at = 0
        """Step at which to see whether it has ended."""
        self._retry_at: int | None = None
        self.failed_in_a_row = 0
        """Saves that failed since the last one that did not."""
        self.blocked_seconds = 0.0
        """Time that training has waited for saves."""

    @property
    def under_way(self) -> int | None:
        """Step of the checkpoint that is being written."""
        return self._step if self._running is not None else None

    @property
    def host_bytes(self) -> int:
        """Host memory that copies take."""
        return self._copy.n_bytes if self._copy is not None else 0

    def is_due(self, step: int) -> bool:
        """Whether to save after this step: by `save_every`, or because a save has failed."""
        if self._running is not None and self._settings.retry_after and step >= self._look_at:
            self._look(step)
        every = self._settings.save_every
        return (every > 0 and step % every == 0) or (self._retry_at is not None and step >= self._retry_at)

    def save(self, state: Mapping[str, Any], *, last: bool = False) -> None:
        """Save, or begin to. The save before it is waited for.

        Args:
            state: TrainState as plain values.
            last: the run ends here: return when the checkpoint is durable.

        Raises:
            SaveFailed: the last save failed, or `max_failed_saves` in a row did.
        """
        self._started_at = time.monotonic()
        if self._running is not None and not self._running.done():
            self._tell.say(
                f"waiting for the save of step {self._step}, which is still being written; a larger "
                "checkpoint.save_every or a faster disk would avoid that"
            )
        self.settle()
        self._step, self._look_at = int(state["step"]), int(state["step"]) + self._settings.retry_after
        self._retry_at = None  # this is the next try; where it fails as well, there will be another
        if last:
            self._save_last(state)
        elif self._copy is not None:
            copied = self._copy.take(self._slices())
            self._running = self._thread.submit(self._write_watched, lambda: copied, state)
            self._waited = time.monotonic() - self._started_at
        else:
            self._conclude(self._write(lambda: RankFile.of(self._slices()), state))
        self.blocked_seconds += time.monotonic() - self._started_at

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the save under way; after Ctrl-C was said twice, do not."""
        if kind is None:
            self.settle()
        elif self._running is not None and not issubclass(kind, KeyboardInterrupt):
            wait([self._running])
            if self._running.exception() is None:  # or else the run ends with the error that it has already
                self._record(self._running.result())
        self._thread.shutdown(wait=False)

    def _save_last(self, state: Mapping[str, Any]) -> None:
        """Straight from where the values are: nothing will change them any more."""
        for left in reversed(range(LAST_ATTEMPTS)):
            outcome = self._write(lambda: RankFile.of(self._slices()), state)
            self._record(outcome)
            if outcome.failure is None:
                return
            if left:
                time.sleep(SECONDS_BETWEEN)
        steps = self._mesh.gather(self._mesh.together(self._store.steps))[0]
        stands = f"the checkpoint of step {steps[-1]} stands" if steps else "there is no checkpoint of this run"
        raise SaveFailed(
            f"the last save, of step {self._step}, failed {LAST_ATTEMPTS} times: {outcome.failure}. {stands}; when the "
            "cause is mended, the same command goes on from there"
        )

    def _look(self, step: int) -> None:
        """See whether the save under way has ended everywhere, without waiting for it."""
        if self._running is not None and all(self._mesh.gather(self._running.done())):
            self.settle()
        else:
            self._look_at = step + self._settings.retry_after

    def settle(self) -> None:
        """Wait for the save under way, if there is one, and draw the consequences.

        Raises:
            SaveFailed: it was the last of `max_failed_saves` failures in a row.
            TrainingHung: the thread's collectives have failed on this rank; the others cannot know.
        """
        if self._running is None:
            return
        try:
            outcome = self._running.result()
        except Exception as error:
            raise TrainingHung(f"save at step {self._step}: the ranks cannot agree on it any more: {error}") from error
        self._running = None
        self._conclude(outcome)

    def _conclude(self, outcome: Outcome) -> None:
        self._record(outcome)
        limit = self._settings.max_failed_saves
        if limit and self.failed_in_a_row >= limit:
            raise SaveFailed(
                f"{self.failed_in_a_row} saves in a row have failed (checkpoint.max_failed_saves): {outcome.failure}"
            )

    def _record(self, outcome: Outcome) -> None:
        """Tell and count what became of a save."""
        if outcome.made_room:
            steps = ", ".join(map(str, outcome.made_room))
            self._tell.say(f"warning: no room for step {outcome.step}: the checkpoint of step {steps} made way for it")
            self._tell.event("made_room", outcome.step, removed=list(outcome.made_room))
        if outcome.set_aside is not None:
            self._tell.say(f"warning: {outcome.set_aside}")
            self._tell.event("set_aside", outcome.step, cause=outcome.set_aside)
        if outcome.not_removed is not None:
            self._tell.say(f"warning: {outcome.not_removed}; tried again after the next save")
            self._tell.event("not_removed", outcome.step, cause=outcome.not_removed)
        if outcome.failure is None:
            self.failed_in_a_row, self._retry_at = 0, None
            waited = time.monotonic() - self._started_at if self._waited is None else self._waited
            self._waited = None
            times = {"seconds": round(waited, 3), "written_in_seconds": round(outcome.seconds, 3)}
            self._tell.event("saved", outcome.step, **times)
            return
        self.failed_in_a_row += 1
        retry_after = self._settings.retry_after
        self._retry_at = outcome.step + retry_after if retry_after else None
        when = f"in {retry_after} steps or when" if retry_after else "when"
        self._tell.say(f"warning: {outcome.failure}; tried again {when} the next save is due")
        self._tell.event("save_failed", outcome.step, cause=outcome.failure, in_a_row=self.failed_in_a_row)

    def _write_watched(self, content: Callable[[], RankFile], state: Mapping[str, Any]) -> Outcome:
        with self._watched(int(state["step"])):
            return self._write(content, state)

    def _write(self, content: Callable[[], RankFile], state: Mapping[str, Any]) -> Outcome:
        """Write, publish, then remove what need not be kept: in the thread, or in its place."""
        step, started_at, settings = int(state["step"]), time.monotonic(), self._settings
        made_room: list[int] = []
        outcome = Outcome(step, 0.0)
        self._tell.make_durable()
        try:
            written = self._written(content, state, made_room)
            told = list(written.not_removed)
            outcome = replace(outcome, set_aside=written.set_aside)
            try:
                verified = written.manifest if settings.verify_before_prune else None
                prune_checkpoints(self._store, self._channel, settings.keep_last, settings.keep_every, verified)
            except CheckpointError as error:
                told = [*(line for line in told if line not in str(error)), str(error)]
            outcome = replace(outcome, not_removed="; ".join(told) or None)
        except CheckpointError as error:
            outcome = replace(outcome, failure=str(error))
        return replace(outcome, made_room=tuple(made_room), seconds=time.monotonic() - started_at)

    def _written(self, content: Callable[[], RankFile], state: Mapping[str, Any], made_room: list[int]) -> Written:
        """Write and publish; where there is no room, let the oldest checkpoints make it, as far as the rule allows.

        Raises:
            CheckpointError: it could not be written.
        """
        while True:
            try:
                return write_checkpoint(self._store, self._channel, content, state, self._identity)
            except NoRoom as error:
                if not self._settings.make_room:
                    raise
                try:
                    removed = make_room(self._store, self._channel, self._settings.keep_last, self._settings.keep_every)
                except CheckpointError as other:
                    raise CheckpointError(f"{error}; {other}") from None
                if not removed:
                    raise
                made_room += removed


def _own_channel(mesh: Mesh, timeout: timedelta) -> Mesh:
    """The same place, with a group that the saving thread has to itself. Every process of the world calls it."""
    if mesh.world_size == 1:
        return mesh
    return replace(mesh, control=torch.distributed.new_group(backend="gloo", timeout=timeout))
