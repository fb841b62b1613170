"""Which part of which logical tensor this process owns. The one file that touches DeepSpeed's private names.

A logical tensor is a parameter of the model under its own name, as if there were one process. Each rank owns flat
slices of some of them, in three values: the fp32 weight and both Adam moments (Muon's matrices: the weight and its
momentum; `ShardedMuon` knows by itself what it owns). ZeRO-1/2 keep flat fp32 partitions whose
`_hp_mapping` says which parameter lies where; ZeRO-3 cuts every parameter evenly and has a public local API;
ZeRO-0 owns everything everywhere, so that rank 0 speaks for all. Under tensor parallelism all of this happens to the
part of the tensor that the process's tensor group gave it: offsets are those of that part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from torch import Tensor

from megagpt.checkpoint.tensors import MOMENTS, WEIGHT, TensorSlice
from megagpt.engine import disk
from megagpt.engine.sharded_muon import ShardedMuon
from megagpt.model.decoder import Decoder
from megagpt.model.layout import Shard
from megagpt.parallel.mesh import Mesh

Reader = Callable[[str, str, int, int], Tensor]
"""(tensor name, value kind, flat start, numel) -> 1-D fp32 tensor; the start counts in what this process holds."""


def owned_slices(optimizer: Any, model: Decoder, mesh: Mesh) -> Iterator[TensorSlice]:
    """Every slice that this process must write, in the model's parameter order.

    Args:
        optimizer: DeepSpeed's.
        model: the layers that this process holds.
        mesh: this process's place.
    """
    _link_optimizer_states(optimizer)
    has_moments = adam_step(optimizer) > 0
    for name, parameter in model.named_parameters():
        shard = model.shards.get(name)
        if mesh.tensor_rank > 0 and (shard is None or not shard.is_cut):
            continue  # the first of the tensor group writes what all of them hold
        if model.logical_name(name) != name:
            continue  # the first stage writes what it shares with the last
        if isinstance(optimizer, ShardedMuon):
            found = optimizer.owned_slice(name, parameter)
        elif hasattr(parameter, "ds_tensor"):
            found = _zero3_slice(name, parameter, optimizer, mesh.zero_rank, has_moments=has_moments)
        elif hasattr(parameter, "_hp_mapping"):
            found = _flat_partition_slice(name, parameter)
        else:
            found = _whole_tensor(name, parameter, optimizer) if mesh.zero_rank == 0 else None
        if found is not None and shard is not None and shard.is_cut:
            found = _without_padding(found, shard)
        if found is not None:
            yield found


def _without_padding(found: TensorSlice, shard: Shard) -> TensorSlice | None:
    """The slice as a part of a logical tensor that is cut; rows that only fill up a vocabulary are left out."""
    numel = min(found.values[WEIGHT].numel(), shard.held_numel - found.start)
    if numel <= 0:
        return None
    values = {kind: tensor[:numel] for kind, tensor in found.values.items()}
    return replace(found, shape=shard.shape, values=values, shard=shard)


def restore_slices(optimizer: Any, model: Decoder, rank: int, read: Reader, adam_step: int) -> None:
    """Fill this process's weights and optimizer state from logical tensors, whatever layout wrote them."""
    if isinstance(optimizer, ShardedMuon):
        optimizer.restore(read, adam_step)
        return
    if hasattr(optimizer, "fp16_partitioned_groups_flat"):
        _restore_zero3(optimizer, model, rank, read, adam_step)
        return
    _make_optimizer_states(optimizer, adam_step)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(read(name, WEIGHT, 0, parameter.numel()).view_as(parameter))
        if hasattr(parameter, "_hp_mapping"):
            mapping = parameter._hp_mapping
            if mapping is not None:
                start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                mapping.get_hp_fragment().data.copy_(read(name, WEIGHT, start, numel))
                for kind in MOMENTS:
                    mapping.get_hp_fragment(kind).data.copy_(read(name, kind, start, numel))
        else:
            state = optimizer.state[parameter]
            for kind in MOMENTS:
                state[kind].copy_(read(name, kind, 0, parameter.numel()).view_as(parameter))


def adam_step(optimizer: Any) -> int:
    """Updates that were made: the steps of the run less those that were skipped."""
    if isinstance(optimizer, ShardedMuon):
        return optimizer.steps
    inner = _inner_optimizer(optimizer)
    for flat in _flat_partitions(optimizer):
        if "step" in inner.state.get(flat, {}):
            return int(inner.state[flat]["step"])
    return 0


def state_tensors(optimizer: Any, model: Decoder) -> dict[str, list[Tensor]]:
    """Every tensor of the training state that is alive now, by kind, wherever DeepSpeed has put it."""
    parameters: list[Any] = list(model.parameters())
    inner = _inner_optimizer(optimizer)
    flats = _flat_partitions(optimizer)
    moments = [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
    attributes = ("grad", "grad_accum", "_hp_grad")
    gradients = [getattr(parameter, name, None) for parameter in (*parameters, *flats) for name in attributes]
    for by_group in (getattr(optimizer, name, None) or {} for name in ("averaged_gradients", "all_grad_tensors")):
        gradients += [gradient for group in by_group.values() for gradient in group or ()]
    gradients.append(getattr(optimizer, "grad_partitions_flat_buffer", None))
    buckets = [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()]
    return {
        "weights": [p.data for p in parameters] + [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")],
        "optimizer": [*flats, *moments],
        "gradients": [gradient for gradient in gradients if isinstance(gradient, Tensor)],
        "buckets": [b for held in buckets for b in (held if isinstance(held, list) else [held]) if b is not None],
    }


def _inner_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside DeepSpeed's wrapper, or itself under ZeRO-0."""
    return getattr(optimizer, "optimizer", optimizer)


def _flat_partitions(optimizer: Any) -> list[Tensor]:
    """The tensors that the torch optimizer really steps: one a parameter group, or the parameters themselves."""
    for attribute in (
        "fp32_partitioned_groups_flat",  # ZeRO-3
        "single_partition_of_fp32_groups",  # ZeRO-1 and 2
        "fp32_groups_flat_partition",  # BF16_Optimizer
    ):
        flats = getattr(optimizer, attribute, None)
        if flats is not None:
            return list(flats)
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _link_optimizer_states(optimizer: Any) -> None:
    """Make `_hp_mapping` point at today's Adam moments: the first link can precede them."""
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _make_optimizer_states(optimizer: Any, step: int) -> None:
    """Empty Adam moments where there are none yet, at the given step count."""
    for flat in _flat_partitions(optimizer):
        _make_state(_inner_optimizer(optimizer), flat, step)
    _link_optimizer_states(optimizer)


def _make_state(inner: Any, flat: Tensor, step: int) -> None:
    inner.state[flat] = {
        "step": torch.tensor(float(step), device=flat.device if inner.defaults.get("fused") else None),
        **{kind: torch.zeros_like(flat) for kind in MOMENTS},
    }


def _flat_partition_slice(name: str, parameter: Any) -> TensorSlice | None:
    mapping = parameter._hp_mapping
    if mapping is None:  # another rank's partition holds all of it
        return None
    weight = mapping.get_hp_fragment()
    known = mapping.optim_fragment or {}
    values = {WEIGHT: weight, **{kind: known.get(kind, torch.zeros_like(weight)) for kind in MOMENTS}}
    return TensorSlice(name, tuple(parameter.shape), mapping.lp_fragment_address.start, values)


def _zero3_slice(name: str, parameter: Any, optimizer: Any, rank: int, *, has_moments: bool) -> TensorSlice | None:
    start, numel = _zero3_extent(parameter, rank)
    if not numel:
        return None
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]

    def local(kind: str | None) -> Tensor:
        if disk.is_on_disk(optimizer, group):  # DeepSpeed would read the group anew for each value of each parameter
            return disk.stored(optimizer, group, kind)[offset : offset + numel]
        held: Tensor
        held = safe_get_local_fp32_param(parameter) if kind is None else safe_get_local_optimizer_state(parameter, kind)
        return held[:numel]

    values = {WEIGHT: local(None)}
    for kind in MOMENTS:  # before the first update there are none
        values[kind] = local(kind) if has_moments else torch.zeros_like(values[WEIGHT])
    return TensorSlice(name, tuple(parameter.ds_shape), start, values)


def _zero3_extent(parameter: Any, rank: int) -> tuple[int, int]:
    """(flat start, numel) of a rank's part; the last parts are padded, possibly wholly."""
    part = parameter.ds_tensor.numel()
    start = rank * part
    return start, max(0, min(part, parameter.ds_numel - start))


def _restore_zero3(optimizer: Any, model: Decoder, rank: int, read: Reader, step: int) -> None:
    """Group after group of what is updated together: where groups live on disk, one is in memory at a time."""
    if getattr(optimizer, "optimizer_swapper", None) is not None:
        optimizer.optimizer_swapper.purge_state()  # moments of another state
    inner = _inner_optimizer(optimizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group, parameters in enumerate(optimizer.fp16_groups):
        flat = optimizer.fp32_partitioned_groups_flat[group]
        with disk.in_memory(optimizer, group):
            _make_state(inner, flat, step)
            for parameter in parameters:
                _, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
                for kind, whole in ((WEIGHT, flat), *((kind, inner.state[flat][kind]) for kind in MOMENTS)):
                    values = _padded(names[parameter], kind, parameter, rank, read)
                    whole.data.narrow(0, offset, numel).copy_(values)
                    if kind == WEIGHT:
                        _set_weight(names[parameter], parameter, values, read)


def _padded(name: str, kind: str, parameter: Any, rank: int, read: Reader) -> Tensor:
    """What a rank holds of a value, with the zeros that fill the last parts up."""
    start, numel = _zero3_extent(parameter, rank)
    values = read(name, kind, start, numel) if numel else torch.zeros(0)
    return torch.nn.functional.pad(values, (0, parameter.ds_tensor.numel() - numel))


def _set_weight(name: str, parameter: Any, part: Tensor, read: Reader) -> None:
    parameter.ds_tensor.data.copy_(part)
    parameter.ds_secondary_tensor = None  # the copy within a node is made again from what was read
    if parameter.data.numel() == parameter.ds_numel:  # small parameters stay gathered on every rank
        parameter.data.copy_(read(name, WEIGHT, 0, parameter.ds_numel).view(parameter.ds_shape))


def _whole_tensor(name: str, parameter: Tensor, optimizer: Any) -> TensorSlice:
    state = optimizer.state.get(parameter, {})
    values = {WEIGHT: parameter.detach().view(-1)}
    for kind in MOMENTS:
        values[kind] = state[kind].view(-1) if kind in state else torch.zeros_like(values[WEIGHT])
    return TensorSlice(name, tuple(parameter.shape), 0, values)
