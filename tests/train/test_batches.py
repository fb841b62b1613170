"""The samples of a step are the same ones in every layout, and so are the validation sequences."""

import numpy as np
import pytest
import torch

from megagpt.data.mixture import open_mixture
from megagpt.errors import DataError
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.plan import BatchPlan
from megagpt.train.batches import TrainBatches, ValidationBatches

SEQ = 16


def mesh(rank, world_size):
    return Mesh(rank, world_size, rank, torch.device("cpu"))


def rows_of(batches):
    return sorted(tuple(row) for batch in batches for row in batch.tolist())


@pytest.mark.parametrize(
    ("world_size", "micro", "accumulation"), [(1, 8, 1), (1, 2, 4), (2, 4, 1), (2, 1, 4), (4, 2, 1)]
)
def test_a_step_holds_the_same_samples_in_every_layout(world_size, micro, accumulation, tokens):
    mixture = open_mixture(tokens, SEQ, 7)
    plan = BatchPlan(world_size, micro, accumulation, SEQ)
    for step in (0, 3):
        found = [TrainBatches(mixture, plan, mesh(rank, world_size)).step(step) for rank in range(world_size)]
        for batches in found:
            assert [tuple(batch.shape) for batch in batches] == [(micro, SEQ + 1)] * accumulation
            assert {batch.dtype for batch in batches} == {torch.int64}
        expected = sorted(tuple(mixture.sample(index).tolist()) for index in range(8 * step, 8 * step + 8))
        assert rows_of(batch for batches in found for batch in batches) == expected


@pytest.mark.parametrize("world_size", [1, 2])
def test_validation_covers_the_same_sequences_every_time_and_in_every_layout(world_size, val_tokens):
    alone = ValidationBatches(val_tokens, 12, BatchPlan(1, 5, 1, SEQ), mesh(0, 1))
    shared = [
        ValidationBatches(val_tokens, 12, BatchPlan(world_size, 5, 1, SEQ), mesh(rank, world_size))
        for rank in range(world_size)
    ]
    assert rows_of(batch for one in shared for batch in one) == rows_of(alone)
    assert rows_of(alone) == rows_of(alone)
    assert {one.sequences for one in shared} == {12}
    assert len({len(list(one)) for one in shared}) == 1  # under ZeRO-3 each forward is a collective


def test_an_odd_number_of_sequences_is_cut_to_equal_shares(val_tokens):
    shared = [ValidationBatches(val_tokens, 7, BatchPlan(2, 4, 1, SEQ), mesh(rank, 2)) for rank in range(2)]
    assert [one.sequences for one in shared] == [6, 6]
    assert [sum(len(batch) for batch in one) for one in shared] == [3, 3]


def test_fewer_sequences_than_processes_are_refused(val_tokens):
    with pytest.raises(DataError, match="1 validation sequences of 16 tokens for 2 processes"):
        ValidationBatches(val_tokens, 1, BatchPlan(2, 4, 1, SEQ), mesh(0, 2))


def test_inputs_and_targets_are_shifted_by_one_in_the_file(val_tokens):
    (batch, *_) = ValidationBatches(val_tokens, 1, BatchPlan(1, 4, 1, SEQ), mesh(0, 1))
    raw = np.fromfile(val_tokens.with_name(val_tokens.name + ".bin"), dtype="<u2")
    assert batch[0].tolist() == raw[: SEQ + 1].tolist()
