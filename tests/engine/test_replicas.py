"""What replicas are compared by: any flipped bit shows in it, and nothing else does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megagpt.engine.replicas import bad_weights, checksum

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@DTYPES
@pytest.mark.parametrize("numel", [1, 2, 3, 5, 12, 17])
def test_every_single_flipped_bit_changes_a_checksum(dtype, numel):
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = int(checksum(values))
    integers = values.view(torch.int32 if values.element_size() == 4 else torch.int16)
    width = 8 * values.element_size()
    for index in range(numel):
        for bit in range(width):
            flip = 1 << bit if bit < width - 1 else -(1 << bit)
            integers[index] ^= flip
            assert int(checksum(values)) != before, (index, bit)
            integers[index] ^= flip
    assert int(checksum(values)) == before


@DTYPES
def test_a_checksum_is_the_same_wherever_and_however_the_values_lie(dtype):
    """A tied head lies elsewhere in its stage's buffer than the embedding does in another's."""
    values = torch.randn(7, 9).to(dtype)
    expected = int(checksum(values))
    for offset in range(9):
        buffer = torch.zeros(offset + values.numel(), dtype=dtype)
        placed = buffer[offset:].view(7, 9)
        placed.copy_(values)
        assert int(checksum(placed)) == expected, offset
    assert int(checksum(values.T.contiguous().T)) == expected


@DTYPES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(dtype, value):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bad = nn.Linear(5, 3).to(dtype), nn.Linear(5, 3).to(dtype)

        def logical_name(self, name):
            return name

    model = Named()
    assert bad_weights(model) == ()
    with torch.no_grad():
        model.good.weight.fill_(torch.finfo(dtype).max)
        model.bad.weight[1, 2] = value
    assert bad_weights(model) == ("bad.weight",)
