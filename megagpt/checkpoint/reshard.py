"""A checkpoint in the files that another layout would have written: each of its processes then reads one of them.

Every layout reads every checkpoint as it is; but a process of many, on shared storage, starts faster from one file that
holds just what it needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megagpt.checkpoint.open import Checkpoint, open_checkpoint, rank_files
from megagpt.checkpoint.rewrite import Writer, copied, new_store, publish_alone
from megagpt.checkpoint.tensors import SliceReader, rank_file, write_extents
from megagpt.config.load import change_config, dump_config
from megagpt.config.schema import TrainingRun
from megagpt.errors import CheckpointError
from megagpt.model.build import build_model
from megagpt.model.decoder import Decoder
from megagpt.model.layout import Extent
from megagpt.parallel.mesh import place_of
from megagpt.parallel.ownership import owned_extents
from megagpt.parallel.plan import plan_batches
from megagpt.parallel.share import meta_share

HISTORY = ("metrics.jsonl", "events.jsonl")
"""What a run that goes on under another folder takes along."""


def reshard(checkpoint: Path, run_dir: Path, world_size: int, words: Sequence[str]) -> str:
    """Write a run whose one checkpoint is another's, in the files of another layout.

    Values, optimizer state, counters and the position in the data stay the same bit for bit. One process does it, and
    holds one slice of one tensor at a time.

    Args:
        checkpoint: a run's folder (its newest checkpoint is taken), or one step's folder.
        run_dir: the new run; the training command goes on from it with `run.dir` set to it.
        world_size: processes of the layout.
        words: YAML files and overrides, as for training: what they say is taken instead of what the checkpoint's own
            configuration says.

    Returns:
        a sentence for the user.

    Raises:
        CheckpointError: no checkpoint, a damaged one, a folder that has checkpoints, no room, or another model.
        ConfigError: the configuration is wrong, or its layout cannot run.
    """
    opened = open_checkpoint(checkpoint)
    config = change_config(opened.config, words)
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": run_dir})})
    _check_same_model(opened, config)
    plan_batches(config, world_size)
    store = new_store(run_dir)
    source = opened.manifest
    with SliceReader(rank_files(opened.path, source)) as reader:
        reader.check_model(_logical_shapes(config))
        writers: dict[str, Writer] = dict(_rank_writers(config, world_size, reader))
        others = sorted(name for name in source.files if not name.endswith(".safetensors"))
        writers |= {name: copied(opened.path / name) for name in others}
        manifest = publish_alone(
            store,
            source.step,
            writers,
            # What is not the layout's is told at the next start, as changed since the checkpoint.
            lambda files: replace(
                source, files=files, config={**source.config, "parallel": _plain(config)["parallel"]}
            ),
            sum(entry.bytes for entry in source.files.values()),
            {"config.yaml": dump_config(config).encode(), **_history(opened.run_dir)},
        )
    size = sum(entry.bytes for entry in manifest.files.values())
    return (
        f"{store.step_dir(manifest.step)}: step {manifest.step} of {opened.run_dir} as {world_size} processes write "
        f"it, {len(manifest.files)} files, {size / 2**20:,.1f} MiB; go on with run.dir={run_dir}"
    )


def _history(run_dir: Path) -> dict[str, bytes]:
    return {name: (run_dir / name).read_bytes() for name in HISTORY if (run_dir / name).is_file()}


def _plain(config: TrainingRun) -> Mapping[str, object]:
    plain: Mapping[str, object] = json.loads(config.model_dump_json())
    return plain


def _check_same_model(opened: Checkpoint, config: TrainingRun) -> None:
    """A reshard moves values; it makes no new ones."""
    pairs = {
        "model": (opened.config.model, config.model),
        "optim.name": (opened.config.optim.name, config.optim.name),
    }
    for key, (before, now) in pairs.items():
        if before != now:
            raise CheckpointError(
                f"{opened.path}: {key} is {before!r} in the checkpoint, {now!r} in the configuration; a reshard "
                "changes the layout alone"
            )


def _logical_shapes(config: TrainingRun) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = build_model(config.model)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _rank_writers(config: TrainingRun, world_size: int, reader: SliceReader) -> Iterator[tuple[str, Writer]]:
    shares: dict[tuple[int, int], Decoder] = {}
    for rank in range(world_size):
        place = place_of(rank, world_size, config.parallel)
        coordinates = (place.pipeline_rank, place.tensor_rank)  # what a process holds hangs on these alone
        if coordinates not in shares:
            shares[coordinates] = meta_share(config, place)
        extents = list(owned_extents(shares[coordinates], config, place))
        yield rank_file(rank), partial(_write_rank, extents, reader)


def _write_rank(extents: Sequence[Extent], reader: SliceReader, path: Path) -> tuple[int, str]:
    described = [(extent, reader.kinds(extent.name)) for extent in extents]
    return write_extents(path, described, _values(described, reader))


def _values(described: Sequence[tuple[Extent, Sequence[str]]], reader: SliceReader) -> Iterator[Tensor]:
    for extent, kinds in described:
        for kind in kinds:
            yield reader.read(extent.name, kind, extent.start, extent.numel, extent.shard)
