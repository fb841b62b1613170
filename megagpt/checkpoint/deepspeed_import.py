"""DeepSpeed's own checkpoints become runs: weights, both Adam moments, step counts and the loss scale go on.

Parameters must have our names, or those of Hugging Face's model of the same family.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megagpt import __version__
from megagpt.checkpoint.deepspeed_files import Counters, DeepSpeedFiles, open_deepspeed
from megagpt.checkpoint.hf import Entry, check_names, hf_entries, with_prefix
from megagpt.checkpoint.rewrite import new_store, publish_alone
from megagpt.checkpoint.store import FileEntry, Manifest
from megagpt.checkpoint.tensors import KINDS, rank_file, write_extents
from megagpt.config.load import dump_config
from megagpt.config.schema import GPT2Model, LlamaModel, TrainingRun
from megagpt.errors import CheckpointError
from megagpt.model.build import build_model
from megagpt.model.layout import Extent

WRAPPER = "module."
"""What DeepSpeed and others put before names."""


def import_deepspeed(folder: Path, config: TrainingRun, trusted: Path | None = None) -> str:
    """Make a run, in `config.run.dir`, whose one checkpoint holds the state of a DeepSpeed checkpoint.

    Training goes on from it under any layout, after as many steps; samples come as if all steps had been made here.

    Args:
        folder: one checkpoint of DeepSpeed's (native of ZeRO-1 to 3, of ZeRO-0 in fp32, or universal), or the folder
            above it.
        config: of the run; its model must be the checkpoint's.
        trusted: the same folder again, where its pickles may run code.

    Returns:
        a sentence for the user.

    Raises:
        CheckpointError: the folder or a file cannot be used, or the model is another: names the tensor.
    """
    if trusted is not None and trusted.resolve() != folder.resolve():
        raise CheckpointError(f"--trust names {trusted}, and the checkpoint is in {folder}; name the same folder twice")
    if config.optim.name != "adamw":
        raise CheckpointError(
            f"optim.name is {config.optim.name!r}; only Adam's state is imported: set optim.name=adamw"
        )
    files = open_deepspeed(folder, trusted=trusted is not None)
    expected = _shapes(config.model)
    entries = _entries(files, config.model, expected)
    run_dir = config.run.dir
    store = new_store(run_dir)
    extents = [Extent(name, shape, 0, torch.Size(shape).numel()) for name, shape in expected.items()]
    manifest = publish_alone(
        store,
        files.counters.steps,
        {rank_file(0): partial(_write, extents, entries, files)},
        partial(_manifest, config, files.counters),
        sum(4 * len(KINDS) * extent.numel for extent in extents),
        {"config.yaml": dump_config(config).encode()},
    )
    return (
        f"{store.step_dir(manifest.step)}: {len(extents)} tensors after {files.counters.steps} steps of {files.folder} "
        f"(DeepSpeed {files.counters.deepspeed_version}); go on with {run_dir / 'config.yaml'}"
    )


def _shapes(model: GPT2Model | LlamaModel) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        built = build_model(model)
    return {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}


def _entries(
    files: DeepSpeedFiles, model: GPT2Model | LlamaModel, expected: Mapping[str, tuple[int, ...]]
) -> dict[str, Entry]:
    """Our name -> how it is made of theirs, whose names are those in the files.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    bare = {name.removeprefix(WRAPPER): name for name in files.shapes}
    if bare.keys() & expected.keys():
        entries = [Entry(name, (name,)) for name in expected]
    else:
        bare = {with_prefix(model, name): held for name, held in bare.items()}
        entries = list(hf_entries(model))
    needed = {part for entry in entries for part in entry.parts}
    check_names(str(files.folder), set(bare), needed, needed)
    named = {
        entry.name: Entry(entry.name, tuple(bare[part] for part in entry.parts), entry.part_rows, entry.transposed)
        for entry in entries
    }
    for name, entry in named.items():
        shapes = {part: files.shapes[part] for part in entry.parts}
        if _joined_shape(entry, shapes) != expected[name]:
            found = ", ".join(f"{part} has shape {shape}" for part, shape in shapes.items())
            raise CheckpointError(
                f"{files.folder}: {found}, which does not make {name} of shape {expected[name]}; "
                "set the model section to the checkpoint's sizes"
            )
    return named


def _joined_shape(entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Of what the entry makes of tensors of these shapes; None where it cannot."""
    if entry.part_rows and entry.part_rows != tuple(shapes[part][0] for part in entry.parts):
        return None
    try:
        return tuple(entry.from_hf({part: torch.empty(shape, device="meta") for part, shape in shapes.items()}).shape)
    except RuntimeError:
        return None


def _write(
    extents: Sequence[Extent], entries: Mapping[str, Entry], files: DeepSpeedFiles, path: Path
) -> tuple[int, str]:
    return write_extents(path, [(extent, KINDS) for extent in extents], _values(extents, entries, files))


def _values(extents: Sequence[Extent], entries: Mapping[str, Entry], files: DeepSpeedFiles) -> Iterator[Tensor]:
    for extent in extents:
        entry = entries[extent.name]
        for kind in KINDS:
            yield entry.from_hf({part: files.read(part, kind) for part in entry.parts}).reshape(-1)


def _manifest(config: TrainingRun, counters: Counters, written: Mapping[str, FileEntry]) -> Manifest:
    return Manifest(
        step=counters.steps,
        files=written,
        state={
            "step": counters.steps,
            "tokens": counters.samples * config.model.max_seq_len,
            "skipped_steps": counters.skipped_steps,
            "engine": {"adam_step": counters.updates, **counters.loss_scaler},
        },
        config=json.loads(config.model_dump_json()),
        data_fingerprint=None,
        tokenizer=None,
        versions={"megagpt": __version__, "deepspeed": counters.deepspeed_version},
    )
