"""Which part of which logical tensor each process of a layout writes into a checkpoint: integers only.

What a running engine finds in DeepSpeed's tensors (`megagpt.engine.slices`) follows from the configuration alone. Here
it is worked out without an engine, so that one process can write the files of many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from megagpt.config.schema import TrainingRun
from megagpt.model.decay import decays
from megagpt.model.decoder import Decoder
from megagpt.model.layout import Extent
from megagpt.parallel.matrices import hidden_matrices, share_out
from megagpt.parallel.mesh import Mesh

Part = tuple[int, int]
"""(start, numel) in what a process holds of a flattened parameter."""
Parts = dict[str, Part]
"""Parameter name -> the part that a process updates; none where that is nothing."""

ALIGNMENT = 2
"""DeepSpeed cuts a flat group of parameters at multiples of so many elements (`nccl_start_alignment_factor`)."""


def owned_extents(model: Decoder, config: TrainingRun, mesh: Mesh) -> Iterator[Extent]:
    """Every slice that a process writes, in the order in which it does.

    Args:
        model: what the process holds, as `meta_share` makes it.
        config: the run's. Keys of `parallel.extra` that move the boundaries of DeepSpeed's parts are not looked at.
        mesh: the process's place.
    """
    parts = (_muon if config.optim.name == "muon" else _ADAMW[config.parallel.zero_stage])(model, config, mesh)
    for name, parameter in model.named_parameters():
        shard = model.shards.get(name)
        is_cut = shard is not None and shard.is_cut
        if name not in parts or (mesh.tensor_rank > 0 and not is_cut) or model.logical_name(name) != name:
            continue  # the first of the tensor group, and the first stage, write what others hold too
        start, numel = parts[name]
        if shard is not None and is_cut:
            numel = min(numel, shard.held_numel - start)  # rows that only fill up a vocabulary are nobody's
            if numel > 0:
                yield Extent(name, shard.shape, start, numel, shard)
        else:
            yield Extent(name, tuple(parameter.shape), start, numel)


def _whole(model: Decoder, config: TrainingRun, mesh: Mesh) -> Parts:  # noqa: ARG001 - one signature for all
    """Without ZeRO all hold everything, and the first speaks for them."""
    if mesh.zero_rank > 0:
        return {}
    return {name: (0, parameter.numel()) for name, parameter in model.named_parameters()}


def _flat(model: Decoder, config: TrainingRun, mesh: Mesh) -> Parts:  # noqa: ARG001 - one signature for all
    """Each group of parameters is laid end to end and cut evenly. Source: Rajbhandari et al. 2020, section 5.1."""
    named = list(model.named_parameters())
    found: Parts = {}
    for group in (
        [(name, p) for name, p in named if decays(name, p)],
        [(name, p) for name, p in named if not decays(name, p)],
    ):
        found |= _stretch(group, mesh, ALIGNMENT)
    return found


def _stretch(group: list[tuple[str, nn.Parameter]], mesh: Mesh, alignment: int) -> Parts:
    """What lies in this process's stretch of a group that is laid end to end."""
    total = sum(parameter.numel() for _, parameter in group)
    size = -(-total // (alignment * mesh.zero_parallel)) * alignment
    found, before = {}, 0
    for name, parameter in group:
        start = max(before, mesh.zero_rank * size)
        stop = min(before + parameter.numel(), (mesh.zero_rank + 1) * size)
        if start < stop:
            found[name] = (start - before, stop - start)
        before += parameter.numel()
    return found


def _each(model: Decoder, config: TrainingRun, mesh: Mesh) -> Parts:  # noqa: ARG001 - one signature for all
    """Every parameter is cut evenly. Source: Rajbhandari et al. 2020, section 5.3."""
    found = {}
    for name, parameter in model.named_parameters():
        size = -(-parameter.numel() // mesh.zero_parallel)
        start = mesh.zero_rank * size
        numel = min(size, parameter.numel() - start)
        if numel > 0:
            found[name] = (start, numel)
    return found


_ADAMW: dict[int, Callable[[Decoder, TrainingRun, Mesh], Parts]] = {0: _whole, 1: _flat, 2: _flat, 3: _each}
"""`parallel.zero_stage` -> which parts a process updates."""


def _muon(model: Decoder, config: TrainingRun, mesh: Mesh) -> Parts:
    """Matrices are given out whole; what is left is laid end to end, group by group."""
    if config.parallel.zero_stage == 0:
        return _whole(model, config, mesh)
    matrices = hidden_matrices(model)
    owners = share_out(matrices, mesh.zero_parallel)
    hidden = {matrix.name for matrix in matrices}
    rest = [(name, p) for name, p in model.named_parameters() if name not in hidden]
    found = {m.name: (0, m.parameter.numel()) for m in matrices if owners[m.name] == mesh.zero_rank}
    found |= _stretch([(name, p) for name, p in rest if decays(name, p)], mesh, 1)
    return found | _stretch([(name, p) for name, p in rest if not decays(name, p)], mesh, 1)
