"""One process; several are in tests/distributed."""

import numpy as np
import pytest
import torch

from megagpt.config.schema import ParallelSection
from megagpt.parallel.mesh import AXES, Mesh, make_mesh, rank_grid


def test_one_process_needs_no_process_group():
    mesh = Mesh(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    assert mesh.sum(1.5, 2.0) == [1.5, 2.0]
    assert mesh.gather({"a": 1}) == [{"a": 1}]
    mesh.barrier()
    assert (mesh.is_main, mesh.data_parallel, mesh.data_parallel_rank) == (True, 1, 0)


def test_only_rank_0_is_main():
    mesh = Mesh(rank=1, world_size=2, local_rank=1, device=torch.device("cpu"))
    assert (mesh.is_main, mesh.data_parallel_rank) == (False, 1)


def test_tensor_groups_are_neighbours_and_coordinates_agree_with_the_grid():
    parallel = ParallelSection(pipeline=2, sequence=2, tensor=2)
    grid = rank_grid(24, parallel)
    assert dict(zip(AXES, grid.shape, strict=True)) == {"pipeline": 2, "data": 3, "sequence": 2, "tensor": 2}
    assert grid[0, 0, 0].tolist() == [0, 1]
    for (stage, data, sequence, tensor), rank in np.ndenumerate(grid):
        mesh = Mesh(int(rank), 24, 0, torch.device("cpu"), tensor=2, sequence=2, pipeline=2)
        found = (mesh.pipeline_rank, mesh.data_parallel_rank, mesh.sequence_rank, mesh.tensor_rank)
        assert found == (stage, data, sequence, tensor)
        assert (mesh.zero_rank, mesh.zero_parallel, mesh.data_parallel) == (2 * data + sequence, 6, 3)
        assert mesh.random_rank == rank // 2


def test_a_world_that_the_degrees_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="3 processes do not divide by tensor x pipeline x sequence = 2"):
        make_mesh(0, 3, 0, torch.device("cpu"), ParallelSection(tensor=2))


def test_without_model_parallelism_deepspeed_is_told_nothing():
    assert make_mesh(0, 3, 0, torch.device("cpu"), ParallelSection()).mpu is None
