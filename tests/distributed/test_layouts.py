"""A checkpoint of any layout is read by any other: the same tensors bit for bit, and the same training after it."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from megagpt.checkpoint.open import rank_files
from megagpt.checkpoint.store import CheckpointStore, verify_checkpoint
from megagpt.checkpoint.tensors import KINDS, SliceReader
from tests.distributed.jobs import Job, read_measured, run_jobs
from tests.distributed.processes import start
from tests.reference_loop import reference_run
from tests.tiny import run_config

SAVED_AT, END = 3, 5
LAYOUTS = list(product((1, 2), (0, 1, 2, 3)))
PAIRS = list(product(LAYOUTS, LAYOUTS))


def name_of(layout):
    return f"{layout[0]}p-zero{layout[1]}"


def pair_name(pair):
    return f"{name_of(pair[0])}-to-{name_of(pair[1])}"


def configuration(where, tokens, stage):
    # Llama with an odd width of the feed-forward: ZeRO-3 must pad its parts.
    words = ["train.max_steps=20", f"parallel.zero_stage={stage}", "model.d_ff=37", "train.micro_batch_size=4"]
    return run_config(where / "unused", tokens, *words, family="llama")


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def measured(where, tokens):
    """Each group writes its checkpoints first, then reads all, as they appear."""
    groups = []
    for world_size in (1, 2):
        here = [layout for layout in LAYOUTS if layout[0] == world_size]
        jobs = [Job(name_of(one), configuration(where, tokens, one[1]), SAVED_AT, save=where / name_of(one))
                for one in here]  # fmt: skip
        for writer, reader in PAIRS:
            if reader in here:
                name = pair_name((writer, reader))
                load = CheckpointStore(where / name_of(writer)).step_dir(SAVED_AT)
                config = configuration(where, tokens, reader[1])
                jobs.append(Job(name, config, END, load=load, save_loaded=where / name))
        out = where / f"{world_size}.json"
        groups.append(start(run_jobs, world_size, jobs, out, log=where / f"{world_size}.log"))
    for group in groups:
        group.finish()
    return read_measured(where / "1.json") | read_measured(where / "2.json")


@pytest.fixture(scope="module")
def reference(where, tokens):
    return reference_run(configuration(where, tokens, 0), END)


def logical_tensors(store_folder):
    step_dir = CheckpointStore(store_folder).step_dir(SAVED_AT)
    with SliceReader(rank_files(step_dir, verify_checkpoint(step_dir))) as reader:
        return {f"{name}|{kind}": reader.read_whole(name, kind) for name in reader.shapes for kind in KINDS}


@pytest.mark.parametrize("pair", PAIRS, ids=pair_name)
def test_what_one_layout_wrote_another_holds_bit_for_bit_and_goes_on_from(pair, measured, reference, where):
    written, held = logical_tensors(where / name_of(pair[0])), logical_tensors(where / pair_name(pair))
    assert written.keys() == held.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, held[name]), name
    after = measured[pair_name(pair)]
    assert after.losses == pytest.approx(reference.losses[SAVED_AT:END], rel=1e-5)
    assert after.grad_norms == pytest.approx(reference.grad_norms[SAVED_AT:END], rel=1e-5)
    assert after.engine_state == {"adam_step": END}


def test_moments_are_really_in_the_checkpoints(measured, where):
    tensors = logical_tensors(where / "2p-zero3")
    moments = [tensor for name, tensor in tensors.items() if not name.endswith("|weight")]
    assert all(tensor.abs().max() > 0 for tensor in moments)
