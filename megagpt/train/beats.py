"""What the ranks of a run know of each other beside their collectives, through the process group's own key-value store.

The store is a TCP server in rank 0's process (or the launcher's), which every host reaches. All calls have a time
limit of their own: where rank 0 stands still, so does the store.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import psutil
from torch._C._distributed_c10d import PrefixStore, Store

T = TypeVar("T")

BEAT_SECONDS = 1.0
"""Between two signs of life."""
_CALL_SECONDS = 2.0
"""Longest that anything here waits for the store."""


@dataclass(frozen=True, slots=True)
class Member:
    """A process of the run."""

    rank: int
    host: str
    pid: int
    created: float
    """When the process started, as its host tells it: a process id may come again."""

    @classmethod
    def of_this_process(cls, rank: int) -> Member:
        """Who we are."""
        return cls(rank, socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    def process(self) -> psutil.Process | None:
        """The very process, where it can be seen from here: on this host, and in no other container."""
        if self.host != socket.gethostname():
            return None
        try:
            process = psutil.Process(self.pid)
            return process if process.create_time() == self.created else None
        except psutil.Error:
            return None


@dataclass(frozen=True, slots=True)
class Report:
    """Where a rank was when the alarm was raised."""

    rank: int
    mark: int
    """Places of the loop that it has come to, all together: whoever has least is behind."""
    doing: str
    where: str
    waits: bool
    writing: str = ""
    """What the thread does that writes a checkpoint; nothing where there is none."""
    writer_waits: bool = False


class Beats:
    """This process's signs of life, its alarm, and what the others say.

    Args:
        store: the process group's.
        rank: this process's.
        world_size: all processes.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        # Two connections: one that waits holds back whoever else uses it.
        self._beating, self._asking = (_connection(store) for _ in range(2))
        for connection in (self._beating, self._asking):
            connection.set_timeout(timedelta(seconds=_CALL_SECONDS))
        self._stopped = threading.Event()
        self.alarm: dict[str, Any] | None = None
        """What another rank has raised."""
        self.silent_since: float | None = None
        """Since when the store does not answer, monotonic seconds."""
        self.lost = False
        """A call has failed: there will be no more."""
        self.next = (rank + 1) % world_size
        """The rank whose signs of life are listened for: in a ring, so that each costs one question a second."""
        self.quiet_seconds = 0.0
        """Since that rank's last one, counted only while the store answers and this process goes on itself."""
        self._next_count = b""
        self._looked_at = time.monotonic()
        self._asked_at = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def raise_alarm(self, reason: str, grace: float, *, writer: bool = False) -> None:
        """Tell all ranks to stop, unless one has told them already; `writer`: because of a save beside training."""
        told = json.dumps({"rank": self._rank, "reason": reason, "grace": grace, "writer": writer})
        self._within(lambda: self._asking.compare_set("alarm", "", told))

    def say_end(self, cause: str) -> None:
        """This process ends, and why; nothing for an end without an error."""
        self._within(lambda: self._asking.set(f"end/{self._rank}", cause))

    def ends(self, ranks: Collection[int]) -> dict[int, str]:
        """Ranks that have said that they end, and why."""
        return self._read("end", ranks, lambda text: text)

    def report(self, report: Report) -> None:
        """For whoever tells what happened."""
        self._within(lambda: self._asking.set(f"report/{self._rank}", json.dumps(asdict(report))))

    def reports(self) -> dict[int, Report]:
        """Those that have come until now."""
        return self._read("report", range(self._world_size), lambda text: Report(**json.loads(text)))

    def counts(self) -> dict[int, int]:
        """How often each rank has given a sign of life."""
        return self._read("beat", range(self._world_size), int)

    def silent_for(self) -> float:
        """Seconds without an answer of the store, beyond what is usual."""
        if not self._thread.is_alive():  # nothing is asked: that others hear nothing of us is theirs to see
            return 0.0
        waiting = time.monotonic() - self._asked_at - 2 * BEAT_SECONDS
        lost = time.monotonic() - self.silent_since if self.silent_since is not None else 0.0
        return max(0.0, waiting, lost)

    def close(self) -> None:
        """No more signs of life."""
        self._stopped.set()

    def _beat(self) -> None:
        count = 0
        while not self._stopped.is_set():
            count += 1
            try:
                self._beating.set(f"beat/{self._rank}", str(count))
                if self._beating.check(["alarm"]):
                    self.alarm = json.loads(self._beating.get("alarm"))
                self._listen()
                self.silent_since = None
            except RuntimeError:  # the server is gone
                if self.silent_since is None:
                    self.silent_since = time.monotonic()
            self._asked_at = time.monotonic()
            self._stopped.wait(BEAT_SECONDS)

    def _listen(self) -> None:
        """A process that was itself held up (stopped, a machine asleep) must not take its own silence for others'."""
        elapsed, self._looked_at = time.monotonic() - self._looked_at, time.monotonic()
        if self.next == self._rank or not self._beating.check([f"beat/{self.next}"]):
            return
        count = self._beating.get(f"beat/{self.next}")
        self.quiet_seconds = self.quiet_seconds + min(elapsed, 2 * BEAT_SECONDS) if count == self._next_count else 0.0
        self._next_count = count

    def _read(self, kind: str, ranks: Collection[int], parse: Callable[[str], T]) -> dict[int, T]:
        def read() -> dict[int, T]:
            there = [rank for rank in ranks if self._asking.check([f"{kind}/{rank}"])]
            return {rank: parse(self._asking.get(f"{kind}/{rank}").decode()) for rank in there}

        return self._within(read) or {}

    def _within(self, work: Callable[[], T]) -> T | None:
        """What a call to the store gives; None where it fails or does not come back, and from then on."""
        if self.lost:
            return None
        results: list[T] = []

        def call() -> None:
            try:
                results.append(work())
            except RuntimeError:
                return

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(_CALL_SECONDS)
        self.lost = not results
        return results[0] if results else None


def _connection(store: Store) -> Store:
    clone: Store = store.clone()  # type: ignore[attr-defined]
    return PrefixStore("watch", clone)
