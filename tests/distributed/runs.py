"""Whole runs by the real command, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megagpt.checkpoint.store import CheckpointStore
from tests.distributed.processes import start, train_command

TIMES = ("step_seconds", "tokens_per_second", "val_seconds")


def train_to_the_end(words: list[str], log: Path, world_size: int) -> None:
    group = start(train_command, world_size, words, log=log)
    codes = group.wait()
    assert codes == [0] * world_size, group.output()


def metric_rows(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in lines]


def step_dir(run_dir: Path, step: int) -> Path:
    return CheckpointStore(run_dir / "checkpoints").step_dir(step)


def saved_state(folder: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Of a checkpoint: file name -> bytes of weights and moments, and the manifest's state."""
    tensors = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    return tensors, json.loads((folder / "manifest.json").read_text())["state"]
