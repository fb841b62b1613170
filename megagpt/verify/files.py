"""The temporary folder of a verification: what its processes are told there, and what they tell."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.config.schema import TrainingRun


@dataclass(frozen=True, slots=True)
class Files:
    """Paths in one folder."""

    folder: Path

    @property
    def log(self) -> Path:
        """Everything that the processes print."""
        return self.folder / "log"

    def write_configs(self, configs: dict[str, TrainingRun]) -> None:
        """Name -> configuration of every run."""
        plain = {name: json.loads(config.model_dump_json()) for name, config in configs.items()}
        (self.folder / "configs.json").write_text(json.dumps(plain))

    def configs(self) -> dict[str, TrainingRun]:
        """What `write_configs` wrote."""
        plain = json.loads((self.folder / "configs.json").read_text())
        return {name: TrainingRun.model_validate_json(json.dumps(config)) for name, config in plain.items()}

    def checkpoints(self, run: str) -> Path:
        """Of one run: before the first step, and after it."""
        return self.folder / f"{run}-checkpoints"

    def seen(self, run: str, rank: int) -> Path:
        """What one process saw of one run."""
        return self.folder / f"{run}-{rank}.json"

    def read_seen(self, run: str, world_size: int) -> list[dict[str, Any]]:
        """Of every process."""
        return [json.loads(self.seen(run, rank).read_text()) for rank in range(world_size)]

    def failure(self, rank: int) -> Path:
        """Why a process ended, where it failed."""
        return self.folder / f"failure-{rank}"

    def failures(self) -> list[str]:
        """Of all processes."""
        return [path.read_text() for path in sorted(self.folder.glob("failure-*"))]

    def say(self, text: str) -> None:
        """How far the processes are."""
        with (self.folder / "progress").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def said(self) -> list[str]:
        """All of it."""
        path = self.folder / "progress"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
