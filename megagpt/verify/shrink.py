"""A training run made small enough for the processes of one host, with what its layout depends on kept.

Kept are the keys of `parallel` (degrees made smaller where they do not fit), precision, recomputation, optimizer,
clipping, whether gradients are accumulated, and of the sizes what divides what: heads and channels by tensor groups,
heads by sequence groups, layers by stages, rows of the vocabulary by what they are padded to.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from megagpt.config.schema import LlamaModel, ParallelSection, TrainingRun, WeightedTokens
from megagpt.errors import ConfigError
from megagpt.parallel.plan import check_layout, is_legal, plan_batches
from megagpt.parallel.stages import n_parts

DEFAULT_PROCESSES = 8
"""As many as are started where nothing is said, at most: a pair along each of three axes."""
LEARNING_RATE = 1e-2
"""So large that a wrong update shows in a weight of 0.02 at once."""
OWN_DTYPE_LEARNING_RATE = 3e-4
"""So small that rounding in bf16 hardly grows from step to step: Adam's steps are as large as the rate allows."""
GRAD_CLIP = 0.25
"""At most: below the norm of any small model at its start, so that clipping is active."""
VOCAB_MULTIPLE = 128
"""Rows of a vocabulary are padded to a multiple of it; the remainder is kept."""
SHOWN = ("model.", "parallel.", "optim.", "train.")
OWN_PRECISION = ("bf16", "fp16")
"""Keys of `parallel.extra` that belong to a precision other than fp32."""

Model = Any
"""GPT2Model or LlamaModel."""


@dataclass(frozen=True, slots=True)
class Small:
    """What is run instead of the user's own run."""

    config: TrainingRun
    """In fp32."""
    in_own_dtype: TrainingRun | None
    """The same in `train.dtype`, where that is another one and runs on a CPU."""
    not_run: str | None
    """Why there is no second configuration where one would be due."""
    world_size: int
    changes: tuple[str, ...]
    """`key before -> after`."""


def shrink(config: TrainingRun, folder: Path, *, steps: int, processes: int | None, world_size: int | None) -> Small:
    """The small run.

    Args:
        config: the user's.
        folder: where its tokens and its run will be.
        steps: optimizer steps.
        processes: to start; None: as few as hold the layout with two along the data axis, 8 at most.
        world_size: of the real run; None: two data-parallel processes, or one where the batch has but one micro-batch.

    Raises:
        ConfigError: the configuration is refused as it is, cannot be made to fit into so many processes, or has an
            optimizer that the comparison does not know.
    """
    if config.optim.name != "adamw":
        raise ConfigError(
            f"optim.name is {config.optim.name}, and verify compares with a plain AdamW loop; add optim.name=adamw to "
            "the command to verify the layout"
        )
    data_parallel, accumulates = _batch_shape(config, world_size)
    parallel, data_parallel = _fit(config.parallel, data_parallel, processes)
    parts = n_parts(parallel)
    accumulation = max(2, parts) if accumulates else 1
    micro = min(2, config.train.micro_batch_size)
    optim = config.optim.model_copy(
        update={
            "lr": max(config.optim.lr, LEARNING_RATE),
            "warmup_steps": min(config.optim.warmup_steps, 2, steps),
            "grad_clip": min(config.optim.grad_clip, GRAD_CLIP),
        }
    )
    train = config.train.model_copy(
        update={
            "max_steps": steps,
            "global_batch_size": micro * accumulation * data_parallel,
            "micro_batch_size": micro,
            "dtype": "fp32",
        }
    )
    defaults = {name: TrainingRun.model_fields[name].default for name in ("checkpoint", "eval", "log")}
    small = config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": folder / "run"}),
            "data": config.data.model_copy(update=_data(config, folder)),
            "optim": optim,
            "train": train,
            "parallel": _without_precision(parallel),
            **defaults,
        }
    )
    world = data_parallel * parallel.tensor * parallel.pipeline * parallel.sequence
    small = _checked(_with_small_model(config, small, world), world)
    own, not_run = _in_own_dtype(config, small, parallel)
    return Small(small, own, not_run, world, tuple(_changes(config, small)))


def _batch_shape(config: TrainingRun, world_size: int | None) -> tuple[int, bool]:
    """(data-parallel processes, 2 at most; whether gradients are accumulated) of the user's run."""
    if world_size is not None:
        plan = plan_batches(config, world_size)
        return min(2, plan.data_parallel), plan.grad_accum_steps > 1
    check_layout(config)
    micro_batches = config.train.global_batch_size // config.train.micro_batch_size
    data_parallel = 2 if micro_batches % 2 == 0 else 1
    return data_parallel, micro_batches > data_parallel


def _fit(parallel: ParallelSection, data_parallel: int, processes: int | None) -> tuple[ParallelSection, int]:
    """Degrees that fit into the processes: the largest is halved until they do; a degree above 1 stays above 1."""
    limit = processes or DEFAULT_PROCESSES
    degrees = {key: getattr(parallel, key) for key in ("pipeline", "sequence", "tensor")}
    while True:
        world = degrees["pipeline"] * degrees["sequence"] * degrees["tensor"]
        if world * data_parallel <= limit and (processes is None or processes % world == 0):
            break
        largest = max(degrees, key=lambda key: degrees[key])
        if degrees[largest] > 2:
            degrees[largest] = max(2, degrees[largest] // 2)
        elif data_parallel > 1:
            data_parallel = 1
        else:
            raise ConfigError(
                f"{limit} processes do not hold tensor x pipeline x sequence = {world}, which is as small as this "
                f"layout gets; give --processes a multiple of {world}"
            )
    if processes is not None:
        data_parallel = processes // world
    split = parallel.pipeline_split
    fitted = parallel.model_copy(update=degrees)
    if split is not None:
        fitted = fitted.model_copy(update={"pipeline_split": _small_split(split, n_parts(fitted))})
    return fitted, data_parallel


def _small_split(split: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """As many numbers as there are parts, the last one kept; 0 stays 0, the smallest becomes 1, others 2."""
    kept = (*split[: parts - 1], split[-1])
    least = min((blocks for blocks in kept if blocks), default=1)
    return tuple(0 if blocks == 0 else 1 if blocks == least else 2 for blocks in kept)


def _data(config: TrainingRun, folder: Path) -> dict[str, Any]:
    """Token files of our own, as many as the user's and as heavy."""
    train = config.data.train
    if isinstance(train, Path):
        return {"train": folder / "tokens", "val": None, "tokenizer": None}
    files = tuple(WeightedTokens(prefix=folder / f"tokens{i}", weight=part.weight) for i, part in enumerate(train))
    return {"train": files, "val": None, "tokenizer": None}


def _without_precision(parallel: ParallelSection) -> ParallelSection:
    extra = {key: value for key, value in parallel.extra.items() if key not in OWN_PRECISION}
    return parallel.model_copy(update={"extra": extra})


def _in_own_dtype(
    config: TrainingRun, small: TrainingRun, parallel: ParallelSection
) -> tuple[TrainingRun | None, str | None]:
    dtype = config.train.dtype
    if dtype == "fp32":
        return None, None
    if dtype == "fp16":
        return None, "DeepSpeed has no fp16 on a CPU: the layout is verified in fp32 alone"
    train = small.train.model_copy(update={"dtype": dtype})
    optim = small.optim.model_copy(update={"lr": OWN_DTYPE_LEARNING_RATE})
    return small.model_copy(update={"train": train, "optim": optim, "parallel": parallel}), None


def _with_small_model(config: TrainingRun, small: TrainingRun, world_size: int) -> TrainingRun:
    """Of all small models that the layout takes, the smallest of those most like the user's."""
    best: tuple[tuple[bool, ...], TrainingRun] | None = None
    candidate = small
    for model in _small_models(config, small.parallel):
        candidate = small.model_copy(update={"model": model})
        if not is_legal(candidate, world_size):
            continue
        same = tuple(before == after for before, after in zip(_structure(config), _structure(candidate), strict=True))
        if best is None or same > best[0]:
            best = same, candidate
        if all(same):
            break
    if best is None:
        plan_batches(candidate, world_size)  # says why
        raise AssertionError("a layout that was refused is planned")
    return best[1]


def _structure(config: TrainingRun) -> tuple[bool, ...]:
    """What divides what, the most important first."""
    model, tensor, sequence = config.model, config.parallel.tensor, config.parallel.sequence
    heads, kv = model.n_head, _n_kv_head(model)
    return (
        kv >= tensor,
        kv == heads,
        kv == 1,
        heads // tensor % sequence == 0,
        kv % (tensor * sequence) == 0,
        kv > tensor,
        heads > tensor,
    )


def _n_kv_head(model: Model) -> int:
    return int(model.n_kv_head if isinstance(model, LlamaModel) else model.n_head)


def _small_models(config: TrainingRun, parallel: ParallelSection) -> Iterator[Model]:
    """Candidates, smaller ones first."""
    model, before = config.model, config.parallel
    width = parallel.tensor * parallel.sequence
    sizes = {
        "n_layer": _n_layer(config, parallel),
        "vocab_size": _with_remainder(model.vocab_size, VOCAB_MULTIPLE, VOCAB_MULTIPLE),
        "max_seq_len": _seq_len(model.max_seq_len, before, parallel),
    }
    if model.family == "gpt2":
        sizes["dropout"] = 0.0  # type: ignore[assignment] # masks differ between layouts
    heads = sorted((kv * group, kv) for kv, group in product(range(1, 2 * width + 2), range(1, 5)))
    for d_head, (n_head, n_kv_head) in product((16, 32), heads):
        changed = sizes | {"n_head": n_head, "d_model": n_head * d_head}
        if isinstance(model, LlamaModel):
            d_ff = parallel.tensor * _with_remainder(model.d_ff // before.tensor, 8, 16)
            yield model.model_copy(update=changed | {"n_kv_head": n_kv_head, "d_ff": d_ff})
        elif n_head == n_kv_head:
            yield model.model_copy(update=changed)


def _n_layer(config: TrainingRun, parallel: ParallelSection) -> int:
    """A block a stage at least, two in all, and one more where the user's do not divide."""
    if parallel.pipeline_split is not None:
        return sum(parallel.pipeline_split)
    uneven = config.model.n_layer % n_parts(config.parallel) != 0
    return min(config.model.n_layer, max(2, n_parts(parallel)) + uneven)


def _with_remainder(value: int, divisor: int, least: int) -> int:
    """The smallest number from `least` on with the remainder of `value`; `value` itself where it is smaller."""
    return min(value, least + (value - least) % divisor)


def _seq_len(value: int, before: ParallelSection, after: ParallelSection) -> int:
    """From 32 on, the first that tensor and sequence groups divide exactly where they divide the user's."""

    def divides(length: int, parallel: ParallelSection) -> list[bool]:
        groups = (parallel.tensor, parallel.sequence, parallel.tensor * parallel.sequence, 2)
        return [length % size == 0 for size in groups]

    wanted = divides(value, before)
    least = min(value, 32)
    candidates = range(least, least + 8 * after.tensor * after.sequence)
    return next((length for length in candidates if divides(length, after) == wanted), value)


def _checked(config: TrainingRun, world_size: int) -> TrainingRun:
    """The same, with every rule of the schema applied again."""
    checked = TrainingRun.model_validate_json(config.model_dump_json())
    plan_batches(checked, world_size)
    return checked


def _changes(before: TrainingRun, after: TrainingRun) -> Iterator[str]:
    old, new = (dict(_leaves(json.loads(config.model_dump_json()))) for config in (before, after))
    for key in old:
        if key.startswith(SHOWN) and key != "train.dtype" and key in new and old[key] != new[key]:
            yield f"{key} {old[key]} -> {new[key]}"


def _leaves(values: dict[str, Any], at: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value
