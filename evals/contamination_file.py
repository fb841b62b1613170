"""contamination.json, as a report reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megagpt.errors import EvalError

CONTAMINATION_FILE = "contamination.json"
FORMAT = 1


@dataclass(frozen=True)
class TaskContamination:
    """What became of one task's documents."""

    dirty: frozenset[str]
    """Their ids, as the samples files have them."""
    clean: frozenset[str]
    not_matchable: frozenset[str]
    common: int
    """Of the dirty ones, those in more than COMMON_DOCUMENTS training documents."""


@dataclass(frozen=True)
class Contamination:
    """What contamination.json holds."""

    tasks: Mapping[str, TaskContamination]
    """By leaf task."""
    data: Mapping[str, str]
    """Task or group that was asked for -> what identified its rows."""
    leaves: Mapping[str, list[str]]
    """Task or group that was asked for -> its leaf tasks."""
    where: str
    """What was scanned, in words."""
    listed: Mapping[str, int] | None
    """Leaf task -> documents that a data job's list names; None without a list."""
    scanned: Mapping[str, int] = field(default_factory=dict)
    """Token file that was scanned -> its tokens, all of them; none of a list."""


def read_contamination(path: Path) -> Contamination:
    """Read the file.

    Raises:
        EvalError: it is damaged or of another format.
    """
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        tasks = {
            name: TaskContamination(
                dirty=frozenset(map(str, table["dirty"])),
                clean=frozenset(map(str, table["clean"])),
                not_matchable=frozenset(map(str, table["not_matchable"])),
                common=table["common"],
            )
            for name, table in content["tasks"].items()
        }
        listed = None
        if content["listed"] is not None:
            listed = {name: len(table["listed"]) for name, table in content["tasks"].items()}
        scanned = {str(row["prefix"]): int(row["tokens"]) for row in content["scanned"]}
        files = [f"{row['prefix']} ({row['tokens']:,} tokens)" for row in content["scanned"]]
        return Contamination(
            tasks,
            content["data"],
            content["leaves"],
            ", ".join(files) or f"the list {content['listed']}",
            listed,
            scanned,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvalError(
            f"{path}: not a contamination file of format {FORMAT} ({error!r}); `megagpt eval contamination` makes it"
        ) from None


def summary(path: Path) -> str:
    """One line a task, for the user."""
    contamination = read_contamination(path)
    lines = [f"{path}: looked in {contamination.where}"]
    for name, leaves in contamination.leaves.items():
        tables = [contamination.tasks[leaf] for leaf in leaves]
        dirty, clean, short = (
            sum(len(getattr(table, kind)) for table in tables) for kind in ("dirty", "clean", "not_matchable")
        )
        share = f" ({dirty / (dirty + clean):.2%})" if dirty + clean else ""
        untold = f", {short} too short to tell" if short else ""
        lines.append(f"  {name}: {dirty} of {dirty + clean} dirty{share}{untold}")
    return "\n".join(lines)
