"""Which checkpoint a run goes on from. It never starts at step 0 where there is anything that could be one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megagpt.checkpoint.store import Survey
from megagpt.errors import CheckpointError


def choose_step(folder: Path, found: Survey, rule: Literal["auto", "never", "must"]) -> int | None:
    """The newest complete checkpoint's step; None to start at step 0.

    Args:
        folder: of the checkpoints.
        found: what lies there.
        rule: `checkpoint.resume`.

    Raises:
        CheckpointError: the rule does not allow what was found.
        CheckpointUnreadable: what may be a newer checkpoint cannot be read.
    """
    found.check_newest_readable(folder)
    also = f" ({found.told()})" if found.rejected else ""
    if rule == "never" and found.steps:
        raise CheckpointError(
            f"checkpoint.resume is 'never' but {folder} holds step {found.steps[-1]}; "
            "choose another run.dir, or remove the folder"
        )
    if rule == "must" and not found.steps:
        raise CheckpointError(f"checkpoint.resume is 'must' but {folder} holds no complete checkpoint{also}")
    if rule == "auto" and not found.steps and not found.is_fresh:
        raise CheckpointError(
            f"{folder}: holds no complete checkpoint{also}, and is not empty. To start at step 0 remove what is there, "
            "or choose another run.dir"
        )
    return found.steps[-1] if found.steps else None
