"""A run's folder -> model and tokenizer, without the configuration it was trained with."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from megagpt.checkpoint.open import open_checkpoint
from megagpt.checkpoint.save import Identity, save_checkpoint
from megagpt.checkpoint.store import CheckpointStore
from megagpt.checkpoint.tensors import KINDS, TensorSlice
from megagpt.errors import CheckpointError
from megagpt.model.build import build_model
from megagpt.model.init import init_weights
from tests.checkpoint.hostile import encoded
from tests.checkpoint.small_saves import ALONE
from tests.tiny import run_config


def save_model(run_dir, config, step):
    model = build_model(config.model)
    init_weights(model, step)
    slices = [
        TensorSlice(name, tuple(p.shape), 0, dict.fromkeys(KINDS, p.detach().flatten()))
        for name, p in model.named_parameters()
    ]
    identity = Identity(config.model_dump(mode="json"), "", None, (), {})
    save_checkpoint(CheckpointStore(run_dir / "checkpoints"), ALONE, slices, {"step": step}, identity)
    return model.eval()


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def run_and_models(request, tmp_path_factory, tokens):
    run_dir = tmp_path_factory.mktemp("run")
    config = run_config(run_dir, tokens, family=request.param)
    return run_dir, config, {step: save_model(run_dir, config, step) for step in (1, 2)}


@pytest.mark.parametrize(("inside", "step"), [("", 2), ("checkpoints", 2), ("checkpoints/step_00000001", 1)])
def test_a_run_its_checkpoints_or_one_step_can_be_named(inside, step, run_and_models):
    run_dir, config, models = run_and_models
    checkpoint = open_checkpoint(run_dir / inside)
    assert (checkpoint.step, checkpoint.run_dir, checkpoint.config) == (step, run_dir.resolve(), config)
    probe = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert torch.equal(checkpoint.load_model()(probe), models[step](probe))


def test_a_model_in_bf16_is_the_fp32_one_rounded_once(run_and_models):
    run_dir, _, models = run_and_models
    model = open_checkpoint(run_dir).load_model(torch.bfloat16)
    for ours, full in ((model.parameters(), models[2].parameters()), (model.buffers(), models[2].buffers())):
        for rounded, exact in zip(ours, full, strict=True):
            assert torch.equal(rounded, exact.to(torch.bfloat16))


def test_the_place_of_a_run_does_not_matter(run_and_models, tmp_path):
    moved = shutil.copytree(run_and_models[0], tmp_path / "moved")
    assert open_checkpoint(moved).hash == open_checkpoint(run_and_models[0]).hash


def test_a_checkpoint_without_tokenizer_says_what_to_set(run_and_models):
    with pytest.raises(CheckpointError, match=r"names no tokenizer.*data.tokenizer"):
        open_checkpoint(run_and_models[0]).tokenizer()


def test_what_cannot_be_opened_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder; name a run"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"holds no complete checkpoint$"):
        open_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "step_00000001.tmp").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"no complete checkpoint; step_00000001.tmp was never finished"):
        open_checkpoint(tmp_path)


def test_a_configuration_of_another_version_is_told(run_and_models, tmp_path):
    moved = shutil.copytree(run_and_models[0], tmp_path / "moved")
    path = moved / "checkpoints" / "step_00000002" / "manifest.json"
    content = json.loads(path.read_text())
    content["config"]["train"]["unheard_of"] = 1
    path.write_bytes(encoded(content))
    with pytest.raises(CheckpointError, match=r"(?s)of another version.*unheard_of"):
        open_checkpoint(moved)
