"""What a person sees while a run goes on: a live line on a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LOG_LINES = 10.0


class ProgressLine:
    """Loss, tokens/s and time left. Silent where `shown` is false (all ranks but the main one)."""

    def __init__(self, console: Console, max_steps: int, start_step: int, *, shown: bool) -> None:
        self.console = console
        self._max_steps = max_steps
        self._shown = shown
        self._live = shown and console.is_terminal
        self._last_line_at = -SECONDS_BETWEEN_LOG_LINES
        self._started_at, self._start_step = time.monotonic(), start_step
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("train", total=max_steps, completed=start_step, status="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """One optimizer step is done."""
        if not self._shown:
            return
        status = f"loss {loss:.4f}  {tokens_per_second:,.0f} tok/s"
        self._progress.update(self._task, completed=step, status=status)
        now = time.monotonic()
        due = now - self._last_line_at >= SECONDS_BETWEEN_LOG_LINES or step == self._max_steps
        if not self._live and due:
            self._last_line_at = now
            left = (now - self._started_at) / (step - self._start_step) * (self._max_steps - step)
            self.say(f"step {step}/{self._max_steps}  {status}  ETA {left / 60:.1f} min")

    def say(self, message: str) -> None:
        """A line that stays; a log file on a disk that is full ends no run."""
        if self._shown:
            with suppress(OSError):
                self.console.print(message, highlight=False, markup=False, soft_wrap=True)
