"""Suites of tasks as data: configs/evals/*.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from megagpt.config.load import Section, load_config
from megagpt.errors import EvalError


class SuiteTask(Section):
    """One task of a suite."""

    task: str
    """A task, group or tag of lm-eval, one of megagpt's, or `heldout`."""
    shots: NonNegativeInt | None = None
    """Few-shot examples; null for the number in the task's definition."""
    limit: PositiveInt | None = None
    """Score only the first documents of each (sub)task; null for all. For `heldout`: windows."""


class Suite(Section):
    """The root of a suite's file."""

    description: str
    """What the suite is for."""
    tasks: Annotated[tuple[SuiteTask, ...], Field(strict=False, min_length=1)]
    """Run in this order."""


def resolve_tasks(
    names: tuple[str, ...], suites_dir: Path, *, n_shots: int | None = None, limit: int | None = None
) -> tuple[SuiteTask, ...]:
    """Suite names and task names -> tasks, each once.

    Args:
        names: what the user wrote; a name with a file `<name>.yaml` in `suites_dir`, or a path of one, is a suite.
        suites_dir: where suites lie.
        n_shots: overrides what suites and definitions say; None leaves it.
        limit: likewise.

    Raises:
        EvalError: no name, or one task with two settings.
        ConfigError: a suite's file is wrong.
    """
    found: dict[str, SuiteTask] = {}
    for name in names:
        file = Path(name) if name.endswith((".yaml", ".yml")) else suites_dir / f"{name}.yaml"
        members = load_config(Suite, [file]).tasks if name.endswith((".yaml", ".yml")) or file.is_file() else None
        for member in members or (SuiteTask(task=name),):
            task = SuiteTask(
                task=member.task,
                shots=member.shots if n_shots is None else n_shots,
                limit=member.limit if limit is None else limit,
            )
            if found.setdefault(task.task, task) != task:
                raise EvalError(f"{task.task} is asked for twice with different shots or limits; name it once")
    if not found:
        raise EvalError("no tasks to run; name a suite (core, fast) or tasks of lm-eval")
    return tuple(found.values())
