"""The samples of a step are the same ones in every layout, and so are the validation sequences."""

import numpy as np
import pytest
import torch

from megagpt.data.mixture import open_mixture
from megagpt.model.loss import IGNORED_TARGET
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.plan import BatchPlan
from megagpt.train.batches import TrainBatches, ValidationBatches

SEQ = 16


def mesh(rank, world_size):
    return Mesh(rank, world_size, rank, torch.device("cpu"))


def rows_of(batches):
    """Rows that count, with the target after the last input."""
    return sorted(
        (*row, targets[-1])
        for batch in batches
        for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)
        if targets[-1] != IGNORED_TARGET
    )


@pytest.mark.parametrize(
    ("world_size", "micro", "accumulation"), [(1, 8, 1), (1, 2, 4), (2, 4, 1), (2, 1, 4), (4, 2, 1)]
)
def test_a_step_holds_the_same_samples_in_every_layout(world_size, micro, accumulation, tokens):
    mixture = open_mixture(tokens, SEQ, 7)
    plan = BatchPlan(world_size, micro, accumulation, SEQ)
    for step in (0, 3):
        found = [TrainBatches(mixture, plan, mesh(rank, world_size)).step(step) for rank in range(world_size)]
        for batches in found:
            assert [tuple(batch.inputs.shape) for batch in batches] == [(micro, SEQ)] * accumulation
            assert {(batch.inputs.dtype, batch.targets.dtype) for batch in batches} == {(torch.int64, torch.int64)}
        expected = sorted(tuple(mixture.sample(index).tolist()) for index in range(8 * step, 8 * step + 8))
        assert rows_of(batch for batches in found for batch in batches) == expected


@pytest.mark.parametrize("world_size", [1, 2])
def test_validation_covers_the_same_sequences_every_time_and_in_every_layout(world_size, val_tokens):
    alone = ValidationBatches(val_tokens, 12, BatchPlan(1, 5, 1, SEQ), mesh(0, 1))
    shared = [
        ValidationBatches(val_tokens, 12, BatchPlan(world_size, 5, 1, SEQ), mesh(rank, world_size))
        for rank in range(world_size)
    ]
    assert counted_rows(shared) == counted_rows([alone])
    assert counted_rows([alone]) == counted_rows([alone])
    assert len({(len(one), len(list(one))) for one in shared}) == 1  # under ZeRO-3 each forward is a collective


@pytest.mark.parametrize("sequences", [1, 7])
def test_sequences_that_do_not_divide_all_count_once_in_equally_many_batches(sequences, val_tokens):
    alone = ValidationBatches(val_tokens, sequences, BatchPlan(1, 2, 1, SEQ), mesh(0, 1))
    shared = [ValidationBatches(val_tokens, sequences, BatchPlan(3, 2, 1, SEQ), mesh(rank, 3)) for rank in range(3)]
    assert counted_rows(shared) == counted_rows([alone])
    assert len(counted_rows(shared)) == sequences
    assert len({tuple(batch.inputs.shape for batch in one) for one in shared}) == 1


@pytest.mark.parametrize("counted_sequences", [7, 12])
def test_isolated_documents_are_told_and_their_first_tokens_are_no_targets(counted_sequences, tokens, val_tokens):
    """In these files 0 ends every document and nothing else."""
    plan = BatchPlan(1, 5, 2, SEQ, isolate_documents=True)
    validation = ValidationBatches(val_tokens, counted_sequences, plan, mesh(0, 1))
    batches = [*TrainBatches(open_mixture(tokens, SEQ, 7), plan, mesh(0, 1)).step(2), *validation]
    for batch in batches:
        assert batch.documents.shape == batch.inputs.shape
        ended = torch.nn.functional.pad((batch.inputs == 0).cumsum(dim=1)[:, :-1], (1, 0))
        assert torch.equal(batch.documents, ended.int())
        fillers = (batch.targets == IGNORED_TARGET).all(dim=1)
        assert torch.equal((batch.targets == IGNORED_TARGET)[~fillers], (batch.inputs == 0)[~fillers])
    assert sum(not row.eq(IGNORED_TARGET).all() for batch in validation for row in batch.targets) == counted_sequences


def counted_rows(processes):
    return rows_of(batch for one in processes for batch in one)


def test_inputs_and_targets_are_shifted_by_one_in_the_file(val_tokens):
    (batch, *_) = ValidationBatches(val_tokens, 1, BatchPlan(1, 4, 1, SEQ), mesh(0, 1))
    raw = np.fromfile(val_tokens.with_name(val_tokens.name + ".bin"), dtype="<u2")
    assert batch.inputs[0].tolist() == raw[:SEQ].tolist()
    assert batch.targets[0].tolist() == raw[1 : SEQ + 1].tolist()
