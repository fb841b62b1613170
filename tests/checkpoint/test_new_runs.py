"""A run that is made of another's checkpoint (reshard, import, convert), and a checkpoint that is set aside: killed at
every call, on a disk that fails, and after a power cut. All of it is there or can be done again; nothing is lost.
"""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch

from megagpt.checkpoint.convert import checkpoint_to_hf, hf_to_checkpoint
from megagpt.checkpoint.deepspeed_import import import_deepspeed
from megagpt.checkpoint.open import CHECKPOINTS
from megagpt.checkpoint.reshard import reshard
from megagpt.checkpoint.store import CheckpointStore, verify_checkpoint
from megagpt.errors import CheckpointError
from megagpt.model.build import build_model
from tests.checkpoint.crash_states import History, recording, violations
from tests.checkpoint.faults import Killed, failing_at, io_error, killed, no_space
from tests.checkpoint.folders import folder_in_memory
from tests.checkpoint.small_saves import check_whole, save
from tests.checkpoint.test_reshard import make_run
from tests.tiny import run_config

N_RANDOM = 1000
SIZES = ("model.n_layer=1", "model.d_model=8", "model.max_seq_len=8", "model.vocab_size=16")
AGAIN = 3
"""How often it is done again where files of the same names were left."""
HISTORY = {"metrics.jsonl": '{"step": 7, "loss": 1.0}\n' * 30, "events.jsonl": '{"event": "saved", "step": 7}\n' * 30}


def universal(folder, config):
    """A universal checkpoint as DeepSpeed lays one out, after 7 updates."""
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in build_model(config.model).named_parameters()}
    for number, (name, shape) in enumerate(shapes.items()):
        (folder / "zero" / name).mkdir(parents=True)
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            torch.save(torch.full(shape, number + math.pi), folder / "zero" / name / f"{kind}.pt")
        torch.save(7, folder / "zero" / name / "step.pt")
    state = {"param_shapes": [shapes], "global_steps": 7, "skipped_steps": 0, "global_samples": 56, "ds_version": "x"}
    torch.save(state, folder / "mp_rank_00_model_states.pt")


@dataclass(frozen=True)
class Made:
    """What makes a new run, and what the run holds when it is done."""

    make: Callable[[Path], object]
    expected: dict[str, bytes]
    again: Counter[frozenset[str]] = field(default_factory=Counter)
    """What was left, by the names of the files -> how often it was then done again."""


def contents(run_dir):
    """Name -> content, but for where the run lies."""
    found = {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for name in found:
        if name.endswith((".yaml", "manifest.json")):
            found[name] = re.sub(rb'"xxh3_128": "\w+"|/[^\s"]*', b"", found[name])
    return found


@pytest.fixture(
    params=["reshard", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("import", "convert"))]
)
def made(request, tmp_path):
    config = run_config(tmp_path / "source", tmp_path / "no tokens", *SIZES, "train.micro_batch_size=1")
    new = config.model_copy
    if request.param == "import":
        universal(tmp_path / "deepspeed", config)

        def make(run_dir):
            import_deepspeed(
                tmp_path / "deepspeed", new(update={"run": config.run.model_copy(update={"dir": run_dir})})
            )
    else:
        make_run(tmp_path / "source", config)
        for name, content in HISTORY.items():
            (tmp_path / "source" / name).write_text(content)
        if request.param == "reshard":
            make = partial(_resharded, tmp_path / "source")
        else:
            checkpoint_to_hf(tmp_path / "source", tmp_path / "hf")
            (tmp_path / "hf" / "tokenizer.json").unlink()
            make = partial(hf_to_checkpoint, tmp_path / "hf")
    make(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    assert "config.yaml" in expected
    assert (HISTORY.keys() <= expected.keys()) == (request.param == "reshard")
    return Made(make, expected)


def _resharded(source, run_dir):
    reshard(source, run_dir, 2, [])


@pytest.fixture
def folder(tmp_path):
    with folder_in_memory(tmp_path) as where:
        yield where


def what_is_wrong(made, run_dir, acknowledged):
    """The checkpoint that can be seen is whole and all that belongs to it is there, or to do it again works."""
    store = CheckpointStore(run_dir / CHECKPOINTS)
    try:
        if not store.steps():
            if acknowledged is not None:
                return "it was done, and there is no checkpoint"
            left = frozenset(str(path.relative_to(run_dir)) for path in run_dir.rglob("*"))
            made.again[left] += 1
            if made.again[left] > AGAIN:
                shutil.rmtree(run_dir, ignore_errors=True)
                return None
            made.make(run_dir)
        for step in store.steps():
            verify_checkpoint(store.step_dir(step))
    except CheckpointError as error:
        return str(error)
    found = contents(run_dir)
    missing = [name for name in made.expected if found.get(name) != made.expected[name]]
    shutil.rmtree(run_dir)
    return f"missing or damaged beside the checkpoint: {missing}" if missing else None


def test_killed_before_any_call_all_is_there_or_it_can_be_done_again(made, folder):
    k, ended = 0, False
    while not ended:
        k += 1
        (folder / str(k)).mkdir()
        try:
            with failing_at(k, killed):
                made.make(folder / str(k) / "run")
            ended = True
        except Killed:
            pass
        assert what_is_wrong(made, folder / str(k) / "run", None) is None, f"killed before call {k}"
    assert k > 12


@pytest.mark.exhaustive
@pytest.mark.parametrize("failure", [no_space, io_error])
def test_a_failing_disk_is_told_and_it_can_be_done_again(failure, made, folder):
    k, ended = 0, False
    while not ended:
        k += 1
        run_dir = folder / str(k) / "run"
        run_dir.parent.mkdir()
        told = None
        try:
            with failing_at(k, failure, once=True):
                made.make(run_dir)
            ended = True
        except CheckpointError as error:
            told = str(error)
        if told is not None:
            assert failure().strerror in told
            assert not list((run_dir / CHECKPOINTS).glob("*.tmp")), "its room is free again"
        assert what_is_wrong(made, run_dir, None) is None, f"failed at call {k}"
    assert k > 12


@pytest.mark.exhaustive
def test_a_power_cut_leaves_all_of_it_or_what_can_be_done_again(made, folder):
    run_dir = folder / "run"
    run_dir.mkdir()
    with recording(run_dir) as recorder:
        made.make(run_dir)
        recorder.acknowledge(7)
    history = History(recorder.calls)
    count, found = violations(history, partial(what_is_wrong, made), N_RANDOM, 1, folder / "states")
    assert found == []
    assert count >= N_RANDOM + 2 * 12


SET_ASIDE = 99
"""Acknowledged when the checkpoint of step 2 was set aside."""


def set_aside_is_wrong(run_dir, acknowledged):
    """Step 1 is there, and step 2, under either name; when it was set aside, it is not seen, and can come again."""
    store = CheckpointStore(run_dir / CHECKPOINTS)
    aside = store.folder / "step_00000002.damaged"
    try:
        steps = check_whole(store)
        if acknowledged in (1, 2, SET_ASIDE) and 1 not in steps:
            return "step 1 is lost"
        if acknowledged in (2, SET_ASIDE):
            if (2 in steps) == aside.exists():
                return f"step 2 is there twice or not at all: {steps}"
            verify_checkpoint(aside if aside.exists() else store.step_dir(2))
        if acknowledged == SET_ASIDE and 2 in steps:
            return "what was set aside is seen again"
        if 2 not in steps:
            save(store, 2)
        assert 2 in check_whole(store)
        names = {path.name for path in store.folder.glob("step_*.damaged*")}
        assert store.set_aside(2).name not in names
    except (CheckpointError, AssertionError) as error:
        return str(error)
    shutil.rmtree(run_dir)
    return None


@pytest.mark.parametrize("n_random", [50, pytest.param(N_RANDOM, marks=pytest.mark.exhaustive)])
def test_a_power_cut_while_a_checkpoint_is_set_aside_loses_none(n_random, folder):
    run_dir = folder / "run"
    run_dir.mkdir()
    store = CheckpointStore(run_dir / CHECKPOINTS)
    with recording(run_dir) as recorder:
        for step in (1, 2):
            save(store, step)
            recorder.acknowledge(step)
        store.set_aside(2)
        recorder.acknowledge(SET_ASIDE)
    count, found = violations(History(recorder.calls), set_aside_is_wrong, n_random, 1, folder / "states")
    assert found == []
    assert count >= n_random + 2 * 30


@pytest.mark.parametrize("failure", [killed, io_error])
def test_to_set_aside_is_done_or_not(failure, folder):
    k, ended = 0, False
    while not ended:
        k += 1
        store = CheckpointStore(folder / str(k) / CHECKPOINTS)
        save(store, 1)
        save(store, 2)
        try:
            with failing_at(k, failure):
                store.set_aside(2)
            ended = True
        except (Killed, OSError):
            pass
        assert set_aside_is_wrong(folder / str(k), 2) is None, f"killed before call {k}"
    assert k >= 2
