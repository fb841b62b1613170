"""Checkpoints that go from one layout to another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from megagpt.checkpoint.store import CheckpointStore
from megagpt.config.schema import TrainingRun
from tests.distributed.jobs import Job, Measured
from tests.distributed.layouts import Configure, Jobs, Layout, check_equal, logical_tensors, measure
from tests.reference_loop import reference_run


@dataclass(frozen=True)
class Moves:
    """Checkpoints written in some places and read in others, each a layout; what was read is saved and gone on from."""

    places: dict[str, Layout]
    pairs: list[tuple[str, str]]
    """Who writes and who reads."""
    where: Path
    configure: Configure
    words: tuple[str, ...] = ()
    """Of the configuration, beside the layout."""

    WRITTEN_AT = 3
    END = 5

    def writers(self) -> Jobs:
        """One for each place that is read from."""
        return [
            (self.places[one], Job(f"write-{one}", self._config(one), self.WRITTEN_AT, save=self._written(one)))
            for one in dict.fromkeys(writer for writer, _ in self.pairs)
        ]

    def readers(self) -> Jobs:
        """One for each pair."""
        return [
            (
                self.places[reader],
                Job(
                    f"{writer}-to-{reader}",
                    self._config(reader),
                    self.END,
                    load=CheckpointStore(self._written(writer)).step_dir(self.WRITTEN_AT),
                    save_loaded=self.where / f"{writer}-to-{reader}",
                ),
            )
            for writer, reader in self.pairs
        ]

    def jobs(self) -> Jobs:
        """For `measure`, where no group of processes reads what a later one writes."""
        return self.writers() + self.readers()

    def measure(self) -> dict[str, Measured]:
        """All are written before any is read."""
        return measure(self.writers(), self.where) | measure(self.readers(), self.where)

    def check(self, measured: dict[str, Measured]) -> None:
        """Every value came over bit for bit, and training goes on as in one process that never stopped."""
        one_process = Layout(family=next(iter(self.places.values())).family)
        reference = reference_run(self.configure(one_process, *self.words), self.END)
        for writer, reader in self.pairs:
            name = f"{writer}-to-{reader}"
            written, held = (
                logical_tensors(one, self.WRITTEN_AT) for one in (self._written(writer), self.where / name)
            )
            check_equal(held, written)
            for key, tensor in written.items():
                assert key.endswith("|weight") or tensor.abs().max() > 0, (name, key)
            after = measured[name]
            assert after.losses == pytest.approx(reference.losses[self.WRITTEN_AT :], rel=1e-5), name
            assert after.grad_norms == pytest.approx(reference.grad_norms[self.WRITTEN_AT :], rel=1e-5), name
            assert after.engine_state == {"adam_step": self.END}, name

    def _config(self, place: str) -> TrainingRun:
        return self.configure(self.places[place], *self.words)

    def _written(self, place: str) -> Path:
        return self.where / f"write-{place}"
