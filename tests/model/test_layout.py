"""What each process holds of a weight, by hand; together they hold all of it once."""

from __future__ import annotations

import pytest
import torch

from megagpt.model.layout import Layout, Shard, column, row, vocab

WHOLE = torch.arange(16.0 * 3).view(16, 3)


def test_fused_matrices_are_cut_each_by_itself():
    second = column((16, 3), (8, 4, 4), degree=2, rank=1)
    assert second.spans == ((4, 4), (10, 2), (14, 2))
    assert torch.equal(second.cut(WHOLE), WHOLE[[4, 5, 6, 7, 10, 11, 14, 15]])
    assert (second.local_size, second.held_numel) == (8, 24)
    bias = column((16,), (8, 4, 4), degree=2, rank=1)
    assert torch.equal(bias.cut(WHOLE[:, 0]), second.cut(WHOLE)[:, 0])


def test_a_row_parallel_weight_is_cut_along_its_inputs():
    assert torch.equal(row((3, 16), degree=4, rank=2).cut(WHOLE.T), WHOLE.T[:, 8:12])


@pytest.mark.parametrize(("rank", "start", "size"), [(0, 0, 8), (1, 8, 8), (2, 16, 0)])
def test_a_vocabulary_is_filled_up_with_zeros_at_its_end(rank, start, size):
    shard = vocab((16, 3), degree=3, rank=rank, multiple=8)
    assert shard.spans == ((start, size),)
    assert shard.held_numel == 3 * size
    local = shard.cut(WHOLE)
    assert local.shape == (8, 3)
    assert torch.equal(local[:size], WHOLE[start : start + size])
    assert local[size:].abs().sum() == 0


def test_what_is_not_cut_is_whole():
    shard = Shard(Layout("replicated"), (16, 3), degree=2, rank=1)
    assert not shard.is_cut
    assert torch.equal(shard.cut(WHOLE), WHOLE)
    assert shard.held_numel == 48
