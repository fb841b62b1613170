"""Which process this is among all: made once at the start, then handed around as one frozen object."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch.distributed import ProcessGroup

from megagpt.config.schema import ParallelSection
from megagpt.errors import MegaGPTError, of_system

T = TypeVar("T")

AXES = ("pipeline", "data", "sequence", "tensor")
"""Slowest first: the ranks of a tensor group follow each other, so that a launcher puts them on one node."""


Grid = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Groups:
    """The process groups that this process belongs to, each along some axes with the others held fixed."""

    tensor: ProcessGroup
    sequence: ProcessGroup
    zero: ProcessGroup
    """data x sequence: ZeRO shards over it, and gradients are reduced over it."""
    pipeline: ProcessGroup
    ends: ProcessGroup | None
    """The first and the last stage, which both hold a tied head; None on the stages between, or without a pipeline."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """The place of this process. Axes, slowest first: pipeline x data x sequence x tensor."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    tensor: int = 1
    """Processes that share each layer's weights."""
    sequence: int = 1
    """Processes that share each sequence."""
    pipeline: int = 1
    """Processes that share the layers."""
    groups: Groups | None = None
    """None where tensor, sequence and pipeline are all 1: then the only group is the world."""
    control: ProcessGroup | None = None
    """Over which `gather` and what is built on it go: all processes; None is the default group."""

    @property
    def data_parallel(self) -> int:
        """Processes along the data axis."""
        return self.world_size // (self.tensor * self.sequence * self.pipeline)

    @property
    def tensor_rank(self) -> int:
        """Coordinate on the tensor axis."""
        return self.rank % self.tensor

    @property
    def sequence_rank(self) -> int:
        """Coordinate on the sequence axis."""
        return self.rank // self.tensor % self.sequence

    @property
    def zero_rank(self) -> int:
        """Coordinate on the data and sequence axes taken as one, over which ZeRO shards."""
        return self.rank // self.tensor % self.zero_parallel

    @property
    def zero_parallel(self) -> int:
        """Processes over which ZeRO shards."""
        return self.data_parallel * self.sequence

    @property
    def data_parallel_rank(self) -> int:
        """Coordinate on the data axis: processes with the same one see the same samples."""
        return self.zero_rank // self.sequence

    @property
    def pipeline_rank(self) -> int:
        """Coordinate on the pipeline axis: the stage."""
        return self.rank // (self.tensor * self.zero_parallel)

    @property
    def random_rank(self) -> int:
        """Processes with the same one draw the same random numbers: those of a tensor group."""
        return self.rank // self.tensor

    @property
    def is_main(self) -> bool:
        """True on the one process that writes shared files and talks to the terminal."""
        return self.rank == 0

    @property
    def mpu(self) -> ModelParallelUnit | None:
        """What DeepSpeed asks about groups; None where the world is the only one."""
        return ModelParallelUnit(self, self.groups) if self.groups is not None else None

    def sum(self, *values: float) -> list[float]:
        """Add up each value over all processes, in double precision."""
        return self._sum(values, None, self.world_size)

    def sum_over_tensor(self, *values: float) -> list[float]:
        """Add up each value over the tensor group, in double precision."""
        return self._sum(values, self.groups.tensor if self.groups is not None else None, self.tensor)

    def _sum(self, values: tuple[float, ...], group: ProcessGroup | None, size: int) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if size > 1:
            torch.distributed.all_reduce(tensor, group=group)
        return [float(value) for value in tensor.tolist()]

    def gather_numbers(self, *values: float) -> list[list[float]]:
        """Every process's values, in rank order, on every process; much cheaper than `gather`."""
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        gathered = [own]
        if self.world_size > 1:
            gathered = [torch.empty_like(own) for _ in range(self.world_size)]
            torch.distributed.all_gather(gathered, own)
        return [[float(value) for value in row.tolist()] for row in gathered]

    def gather(self, value: T) -> list[T]:
        """Every process's value, in rank order, on every process."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, value, group=self.control)
        return gathered

    def together(self, work: Callable[[], T]) -> T:
        """Let every process do its part; where one fails, all of them raise, so that none waits for another.

        Raises:
            MegaGPTError: on every process, what the first one that failed raised; an OSError in its own words, with the
                rank, as `SystemFailed` where it may pass.
        """
        results: list[T] = []
        failure: MegaGPTError | None = None
        try:
            results.append(work())
        except MegaGPTError as error:
            failure = error
        except OSError as error:
            failure = of_system(error, f"rank {self.rank}: ")
        for found in self.gather(failure):
            if found is not None:
                raise found
        return results[0]

    def on_main(self, work: Callable[[], object]) -> None:
        """Let the main process alone do something to shared files; the others wait, and share its failure."""
        self.together(work if self.is_main else lambda: None)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            torch.distributed.barrier(group=self.control)


def make_mesh(rank: int, world_size: int, local_rank: int, device: torch.device, parallel: ParallelSection) -> Mesh:
    """The mesh with its process groups. Every process of the world calls it, after joining the world.

    Raises:
        ValueError: the degrees do not divide the world size; `plan_batches` tells the user before.
    """
    degrees = (parallel.pipeline, parallel.sequence, parallel.tensor)
    model_parallel = math.prod(degrees)
    if world_size % model_parallel:
        raise ValueError(f"{world_size} processes do not divide by tensor x pipeline x sequence = {model_parallel}")
    groups = None
    if model_parallel > 1:
        grid = rank_grid(world_size, parallel)
        groups = Groups(
            tensor=_own(grid, "tensor"),
            sequence=_own(grid, "sequence"),
            zero=_own(grid, "data", "sequence"),
            pipeline=_own(grid, "pipeline"),
            ends=_group_along(grid[:: len(grid) - 1], "pipeline") if parallel.pipeline > 1 else None,
        )
    return Mesh(rank, world_size, local_rank, device, parallel.tensor, parallel.sequence, parallel.pipeline, groups)


def place_of(rank: int, world_size: int, parallel: ParallelSection) -> Mesh:
    """The place of a process that does not run: what it would hold can be asked, but nothing can be sent."""
    nobody = cast("ProcessGroup", None)
    groups = Groups(tensor=nobody, sequence=nobody, zero=nobody, pipeline=nobody, ends=None)
    degrees = (parallel.tensor, parallel.sequence, parallel.pipeline)
    return Mesh(rank, world_size, rank, torch.device("cpu"), *degrees, groups)


def rank_grid(world_size: int, parallel: ParallelSection) -> Grid:
    """All ranks, shaped (pipeline, data, sequence, tensor)."""
    pipeline, sequence, tensor = parallel.pipeline, parallel.sequence, parallel.tensor
    return np.arange(world_size).reshape(pipeline, -1, sequence, tensor)


def _own(grid: Grid, *axes: str) -> ProcessGroup:
    """As `_group_along`, where every process is in the grid."""
    group = _group_along(grid, *axes)
    assert group is not None  # noqa: S101
    return group


def _group_along(grid: Grid, *axes: str) -> ProcessGroup | None:
    """This process's group of the ranks that differ on these axes only; None where the grid does not have it.

    All groups are made by all processes.
    """
    along = [AXES.index(axis) for axis in axes]
    size = math.prod(grid.shape[axis] for axis in along)
    rows = np.moveaxis(grid, along, range(-len(along), 0)).reshape(-1, size)
    own: ProcessGroup | None
    own, _ = torch.distributed.new_subgroups_by_enumeration(rows.tolist())  # type: ignore[no-untyped-call]
    return own


@dataclass(frozen=True, slots=True)
class ModelParallelUnit:
    """The mesh in the words of Megatron's `mpu`, of which DeepSpeed asks these.

    The sequence axis is folded into the data axis: every process of both reduces the same gradients.
    """

    mesh: Mesh
    groups: Groups

    def get_model_parallel_rank(self) -> int:
        """Parameters without a tag count in the gradient norm where it is 0."""
        return self.mesh.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Processes that share each layer's weights."""
        return self.mesh.tensor

    def get_model_parallel_group(self) -> ProcessGroup:
        """Over which norms are added up."""
        return self.groups.tensor

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        """Place among those that reduce the same gradients."""
        return self.mesh.zero_rank

    def get_data_parallel_world_size(self) -> int:
        """How many reduce the same gradients."""
        return self.mesh.zero_parallel

    def get_data_parallel_group(self) -> ProcessGroup:
        """Over which gradients are reduced and ZeRO shards."""
        return self.groups.zero
