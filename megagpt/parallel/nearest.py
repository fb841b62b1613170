"""The layouts nearest to one that cannot run: arithmetic on configurations, given a test of what can.

A layout is the part of `parallel` that `CHOICES` names. How far two are apart: first how many of these keys differ,
then by how much: the product over those keys of the ratio of two degrees, or of 2 for each ZeRO stage between two, or
of 2 for another word. Of layouts equally far, the one that a process needs the least memory for; then the one that
communicates less: lower degrees of tensor and sequence, then a lower ZeRO stage, then a shorter pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, product
from typing import Any

from megagpt.config.schema import TrainingRun
from megagpt.model.memory import MemoryLayout, memory_bytes

LARGEST_DEGREE = 64
"""Where the number of processes is not known, degrees up to this one are looked at."""

IsLegal = Callable[[TrainingRun], bool]
Values = dict[str, Any]
"""Key of `parallel` -> its value."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a key may be changed to, and how far two of its values are apart."""

    values: Callable[[TrainingRun, int | None], Collection[Any]]
    """(configuration, number of processes if known) -> all values that are looked at."""
    factor: Callable[[Any, Any], Fraction]
    """At least 1, and 1 for equal values alone."""


def _degrees(n_whole: Callable[[TrainingRun], int]) -> Callable[[TrainingRun, int | None], list[int]]:
    """Divisors of the number of processes; where it is not known, powers of two and divisors of what is shared out."""

    def degrees(config: TrainingRun, world_size: int | None) -> list[int]:
        if world_size is not None:
            return [degree for degree in range(1, world_size + 1) if world_size % degree == 0]
        whole = n_whole(config)
        return [degree for degree in range(1, LARGEST_DEGREE + 1) if degree & (degree - 1) == 0 or whole % degree == 0]

    return degrees


def _ratio(before: int, after: int) -> Fraction:
    return Fraction(max(before, after), min(before, after))


def _stages_between(before: int, after: int) -> Fraction:
    return Fraction(2 ** abs(before - after))


def _is_other(before: object, after: object) -> Fraction:
    return Fraction(1 if before == after else 2)


CHOICES: dict[str, Choice] = {
    "tensor": Choice(_degrees(lambda c: c.model.n_head), _ratio),
    "pipeline": Choice(_degrees(lambda c: c.model.n_layer), _ratio),
    "sequence": Choice(_degrees(lambda c: c.model.n_head), _ratio),
    "zero_stage": Choice(lambda _, __: (0, 1, 2, 3), _stages_between),
    "tensor_sequence": Choice(lambda _, __: (False, True), _is_other),
    "pipeline_schedule": Choice(lambda _, __: ("1f1b", "dualpipev"), _is_other),
    "pipeline_split": Choice(lambda c, _: {c.parallel.pipeline_split, None}, _is_other),
}
"""Key of `parallel` -> what it may be changed to. A new key of a layout is a line here."""


def nearest_layouts(config: TrainingRun, world_size: int | None, is_legal: IsLegal, count: int = 2) -> list[Values]:
    """The layouts nearest to a configuration's own that can run, nearest first; its own is not among them.

    Args:
        config: of which only keys of `CHOICES` are changed.
        world_size: number of processes, None where it is not known.
        is_legal: whether a configuration can run.
        count: how many at most.

    Returns:
        For each the keys that change, with their new values.
    """
    found: list[Values] = []
    for n_changed in range(1, len(CHOICES) + 1):
        here = [values for values in _changes(config, world_size, n_changed) if is_legal(with_layout(config, values))]
        found += sorted(here, key=lambda values: distance(config, values, world_size))
        if len(found) >= count:  # what changes more keys is farther
            break
    return found[:count]


def with_layout(config: TrainingRun, values: Values) -> TrainingRun:
    """The configuration with these keys of `parallel` changed."""
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=values)})


def distance(config: TrainingRun, values: Values, world_size: int | None) -> tuple[Any, ...]:
    """How far a changed layout is from the configuration's own: smaller is nearer, and no two are equal."""
    before = config.parallel
    factor = Fraction(1)
    for key, value in values.items():
        factor *= CHOICES[key].factor(getattr(before, key), value)
    changed = with_layout(config, values)
    after = changed.parallel
    communication = (after.tensor, after.sequence, after.zero_stage, after.pipeline)
    rest = tuple(repr(getattr(after, key)) for key in CHOICES)
    return len(values), factor, memory_per_process(changed, world_size), communication, rest


def memory_per_process(config: TrainingRun, world_size: int | None) -> float:
    """Bytes at the peak of one process, roughly: the layers are taken to be shared out evenly over the pipeline.

    Where the number of processes is not known, nothing is data-parallel.
    """
    parallel, n_layer = config.parallel, config.model.n_layer
    model_parallel = parallel.tensor * parallel.pipeline * parallel.sequence
    data_parallel = (world_size or model_parallel) // model_parallel or 1
    of_the_first = range(-(-n_layer // parallel.pipeline) + 1)
    pipelined = parallel.pipeline > 1
    layout = MemoryLayout(
        micro_batch_size=config.train.micro_batch_size,
        dtype=config.train.dtype,
        zero_stage=parallel.zero_stage,
        zero_parallel=data_parallel * parallel.sequence,
        tensor=parallel.tensor,
        tensor_sequence=parallel.tensor_sequence,
        sequence=parallel.sequence,
        parts=(of_the_first,) if pipelined else None,
        in_flight=(parallel.pipeline,),
        recompute=config.train.recompute,
    )
    return memory_bytes(config.model, layout).total_bytes


def in_words(config: TrainingRun, layouts: list[Values]) -> str:
    """`parallel.pipeline=4 parallel.zero_stage=1, or parallel.pipeline=1 parallel.zero_stage=3`.

    Each layout says every key in which any of them differs from the configuration.
    """
    keys = [key for key in CHOICES if any(key in values for values in layouts)]
    return ", or ".join(
        " ".join(f"parallel.{key}={_as_yaml(getattr(with_layout(config, values).parallel, key))}" for key in keys)
        for values in layouts
    )


def _changes(config: TrainingRun, world_size: int | None, n_changed: int) -> Iterator[Values]:
    """Every layout that differs from the configuration's own in so many keys and fits into the world."""
    others = {
        key: [value for value in choice.values(config, world_size) if value != getattr(config.parallel, key)]
        for key, choice in CHOICES.items()
    }
    for keys in combinations(CHOICES, n_changed):
        for chosen in product(*(others[key] for key in keys)):
            yield dict(zip(keys, chosen, strict=True))


def _as_yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
