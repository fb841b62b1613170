"""One process; several are in tests/distributed."""

import torch

from megagpt.parallel.mesh import Mesh


def test_one_process_needs_no_process_group():
    mesh = Mesh(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    assert mesh.sum(1.5, 2.0) == [1.5, 2.0]
    assert mesh.gather({"a": 1}) == [{"a": 1}]
    mesh.barrier()
    assert (mesh.is_main, mesh.data_parallel, mesh.data_parallel_rank) == (True, 1, 0)


def test_only_rank_0_is_main():
    mesh = Mesh(rank=1, world_size=2, local_rank=1, device=torch.device("cpu"))
    assert (mesh.is_main, mesh.data_parallel_rank) == (False, 1)
