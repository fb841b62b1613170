"""Do the processes that must hold the same weights hold the same weights?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megagpt.errors import TrainingDiverged
from megagpt.model.decoder import Decoder
from megagpt.parallel.mesh import Mesh

_INTEGERS = {2: torch.int16, 4: torch.int32}
"""Bytes of a weight -> the type that reads its bits."""


def check_replicas(model: Decoder, mesh: Mesh, *, cut_over_data: bool) -> None:
    """Compare checksums of the weights as the forward sees them; a few bytes a tensor go over the wire.

    Over the data axis all weights are the same, over the tensor group those that are not cut, and on the first and the
    last stage of a pipeline a tied head. Under ZeRO-3, which cuts all weights (`cut_over_data`), nothing is compared.

    Raises:
        TrainingDiverged: on every process, naming tensors and ranks: a gradient was lost, or a device computes wrongly.
    """
    parameters = dict(model.named_parameters())
    problems: list[str] = []
    for names, group in _replicated(model, mesh, cut_over_data=cut_over_data):
        logical = [model.logical_name(name) for name in names]
        problems += _compare([parameters[name] for name in names], logical, group)
    found = sorted({problem for some in mesh.gather(problems) for problem in some})
    if found:
        raise TrainingDiverged(
            f"weights that must be the same differ: {'; '.join(found[:4])}. Nothing was saved and the last checkpoint "
            "stands; go on from it without the host that differs"
        )


def _replicated(
    model: Decoder, mesh: Mesh, *, cut_over_data: bool
) -> Iterator[tuple[Sequence[str], ProcessGroup | None]]:
    """Names of parameters, and the group whose processes all hold the same values of them."""
    names = [name for name, _ in model.named_parameters()]
    if mesh.zero_parallel > 1 and not cut_over_data:
        yield names, mesh.groups.zero if mesh.groups is not None else None
    if mesh.groups is None or cut_over_data:
        return
    if mesh.tensor > 1:
        yield [name for name in names if not model.shards[name].is_cut], mesh.groups.tensor
    if model.shared_with_other_end is not None:
        yield [model.shared_with_other_end], mesh.groups.ends


def _compare(parameters: Sequence[Tensor], names: Sequence[str], group: ProcessGroup | None) -> list[str]:
    if not names:
        return []
    own = torch.stack([_checksum(parameter) for parameter in parameters])
    members = torch.distributed.get_process_group_ranks(group) if group is not None else None
    size = torch.distributed.get_world_size(group)
    gathered = [torch.empty_like(own) for _ in range(size)]
    torch.distributed.all_gather(gathered, own, group=group)
    return [
        f"{name} of rank {members[place] if members is not None else place} and of rank "
        f"{members[0] if members is not None else 0}"
        for place, theirs in enumerate(gathered)
        for name, same in zip(names, (theirs == gathered[0]).tolist(), strict=True)
        if not same
    ]


def _checksum(parameter: Tensor) -> Tensor:
    """The sum of the bits, modulo 2^64: exact and independent of the order of summation."""
    bits = parameter.detach().contiguous().view(_INTEGERS[parameter.element_size()])
    return bits.sum(dtype=torch.int64)
