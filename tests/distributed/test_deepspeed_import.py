"""Checkpoints that DeepSpeed wrote go on here: bit for bit the state that it had, and the same losses."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from megagpt.checkpoint.deepspeed_import import import_deepspeed
from megagpt.checkpoint.hf import hf_state_to_model
from megagpt.checkpoint.hf_config import model_from_hf_config
from megagpt.checkpoint.open import CHECKPOINTS, rank_files
from megagpt.checkpoint.store import CheckpointStore, read_manifest, verify_checkpoint
from megagpt.checkpoint.tensors import KINDS, SliceReader
from megagpt.cli import main
from megagpt.config.schema import TrainingRun
from megagpt.errors import CheckpointError
from tests.distributed.deepspeed_jobs import Saved, go_on, save_a_hugging_face_model, save_with_deepspeed
from tests.distributed.processes import start
from tests.tiny import run_config, run_words

FIRST, LAST = 3, 8
ALL = {
    "zero0": ["parallel.zero_stage=0"],
    "zero1": ["parallel.zero_stage=1"],
    "zero2": ["parallel.zero_stage=2"],
    "zero3": ["parallel.zero_stage=3", "parallel.update_elements=4000"],  # several groups
    "bf16": ["train.dtype=bf16"],
    "bf16-zero3": ["train.dtype=bf16", "parallel.zero_stage=3"],
    "fp16": ["train.dtype=fp16", "parallel.extra={fp16: {initial_scale_power: 10, loss_scale_window: 2}}"],
    "accumulating": ["parallel.zero_stage=2", "train.micro_batch_size=2"],
}
FAST = ("zero0", "zero2", "zero3")
KINDS_OF = {"zero0": ("native",)}
"""DeepSpeed makes universal only what was sharded."""
BOTH = ("native", "universal")


def configuration(where, tokens, name):
    words = [f"train.max_steps={LAST}", "train.micro_batch_size=4", *ALL[name]]
    return run_config(where / "unused", tokens, *words, family="llama" if name == "zero1" else "gpt2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokens):
    """Folder, and the losses of the unbroken runs."""
    return save_runs(tmp_path_factory.mktemp("deepspeed"), tokens, FAST)


def save_runs(where, tokens, names):
    runs = [Saved(name, configuration(where, tokens, name), where / name, FIRST, LAST) for name in names]
    start(save_with_deepspeed, 2, runs, where / "losses.json", log=where / "log").finish()
    return where, json.loads((where / "losses.json").read_text())


def tensors_of(step_dir):
    manifest = verify_checkpoint(step_dir)
    with SliceReader(rank_files(step_dir, manifest)) as reader:
        return {f"{name}|{kind}": reader.read_whole(name, kind) for name in reader.shapes for kind in KINDS}


def into(config, run_dir):
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": run_dir})})


def check(where, losses, tokens, names, tmp_path):
    """Native and universal: state to the last bit; the losses go on as if nothing had been."""
    runs = []
    for name in names:
        config = configuration(where, tokens, name)
        expected = tensors_of(CheckpointStore(where / name / "ours").step_dir(FIRST))
        ours = read_manifest(CheckpointStore(where / name / "ours").step_dir(FIRST)).state
        for kind in KINDS_OF.get(name, BOTH):
            run_dir = tmp_path / f"{name}-{kind}"
            import_deepspeed(where / name / ("universal" if kind == "universal" else ""), into(config, run_dir))
            step_dir = CheckpointStore(run_dir / CHECKPOINTS).step_dir(FIRST)
            found = tensors_of(step_dir)
            assert found.keys() == expected.keys()
            assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
            state = read_manifest(step_dir).state
            assert (state["step"], state["engine"]) == (FIRST, ours["engine"])
            assert state["tokens"] == FIRST * config.train.global_batch_size * config.model.max_seq_len
            runs.append((f"{name}-{kind}", config, step_dir, LAST))
    start(go_on, 2, runs, tmp_path / "on.json", log=tmp_path / "on.log").finish()
    continued = json.loads((tmp_path / "on.json").read_text())
    assert continued == {f"{name}-{kind}": losses[name][FIRST:] for name in names
                         for kind in KINDS_OF.get(name, BOTH)}  # fmt: skip


def test_zero_0_2_and_3_and_their_universal_forms_go_on(saved, tokens, tmp_path):
    check(*saved, tokens, FAST, tmp_path)


@pytest.mark.exhaustive
def test_every_stage_and_precision_goes_on(tmp_path, tokens):
    where, losses = save_runs(tmp_path, tokens, ALL)
    check(where, losses, tokens, ALL, tmp_path)


@pytest.fixture
def copied(saved, tmp_path):
    """One native checkpoint (ZeRO-2, two ranks) and its universal form, to be spoilt."""
    where, _ = saved
    shutil.copytree(where / "zero2" / f"global_step{FIRST}", tmp_path / "native")
    shutil.copytree(where / "zero2" / "universal", tmp_path / "universal")
    return tmp_path


def refused(copied, folder, config, match):
    with pytest.raises(CheckpointError, match=match):
        import_deepspeed(copied / folder, into(config, copied / "run"))
    assert not (copied / "run" / "config.yaml").exists()
    assert CheckpointStore(copied / "run" / CHECKPOINTS).steps() == []


@pytest.fixture
def config(tokens, tmp_path):
    return configuration(tmp_path, tokens, "zero2")


def test_a_missing_tensor_is_named(copied, config):
    shutil.rmtree(copied / "universal" / "zero" / "blocks.1.attention.qkv.bias")
    refused(copied, "universal", config, "missing tensors: blocks.1.attention.qkv.bias")


def test_a_missing_moment_is_named(copied, config):
    (copied / "universal" / "zero" / "final_norm.bias" / "exp_avg_sq.pt").unlink()
    refused(copied, "universal", config, "final_norm.bias: 0 of 24 values of 'exp_avg_sq'")


def test_another_shape_is_named(copied, config, tokens):
    other = run_config(copied / "unused", tokens, "model.n_layer=2", "model.d_model=32")
    for folder in ("native", "universal"):
        refused(copied, folder, other, r"embedding.tokens.weight has shape \(61, 24\), .* of shape \(61, 32\)")


def test_a_tensor_too_many_is_named(copied, config, tokens):
    refused(copied, "native", run_config(copied / "unused", tokens, "model.n_layer=1"), "unknown tensors: blocks.1")


def test_a_missing_rank_is_told(copied, config):
    (copied / "native" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    refused(copied, "native", config, r"ranks \[0\] are missing")


def test_a_missing_last_rank_is_told(copied, config):
    (copied / "native" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    refused(copied, "native", config, "1 of 2 files")


@pytest.mark.parametrize("content", [b"", b"no zip file", None])
def test_a_damaged_file_is_named(content, copied, config):
    file = copied / "native" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.write_bytes(file.read_bytes()[:5000] if content is None else content)
    refused(copied, "native", config, f"{file}: cannot be read")


@pytest.mark.parametrize("key", ["param_slice_mappings", "partition_count", "base_optimizer_state"])
def test_a_file_of_another_layout_is_refused(key, copied, config):
    file = copied / "native" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = torch.load(file, weights_only=False)
    del content["optimizer_state_dict"][key]
    torch.save(content, file)
    refused(copied, "native", config, f"not laid out as DeepSpeed 0.19 does it .KeyError: '{key}'")


@pytest.mark.parametrize("tag", ["", "..", ".", "../elsewhere", "/etc", "no-such-folder"])
def test_a_pointer_to_elsewhere_is_refused(tag, copied, config, tmp_path):
    (copied / "elsewhere").mkdir()
    (copied / "above").mkdir()
    (copied / "above" / "latest").write_text(tag)
    refused(copied, "above", config, "latest: names .* which is no folder beside it")


@pytest.fixture
def unsharded(saved, tmp_path):
    """The one file of ZeRO-0, to be spoilt: what it holds, and how to put it back."""
    where, _ = saved
    shutil.copytree(where / "zero0" / f"global_step{FIRST}", tmp_path / "native")
    file = tmp_path / "native" / "mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=False)
    return content, lambda: torch.save(content, file)


def test_moments_without_names_are_taken_only_where_shapes_tell_whose_they_are(unsharded, tokens, tmp_path):
    content, put_back = unsharded
    config = configuration(tmp_path, tokens, "zero0")
    groups = content["optimizer"]["param_groups"]
    assert len(groups) == 2
    groups[0]["params"].reverse()
    put_back()
    refused(tmp_path, "native", config, "which moments are those of .* cannot be told: they have numbers .*ZeRO-1")
    groups[0]["params"].reverse()
    numbers = groups[1]["params"]
    groups[1]["params"], more = numbers[::2], {**groups[1], "params": numbers[1::2]}
    groups.append(more)
    put_back()
    refused(tmp_path, "native", config, "which moments are those of .* and 2 of 3 groups come with its shape next")
    groups.pop()
    put_back()
    refused(tmp_path, "native", config, r"28 parameters, and optimizer state of \d+; it must be of all of them")


@pytest.mark.parametrize("held", [None, {"fp32_groups_flat": []}])
def test_zero_0_in_half_precision_is_refused_with_the_way_out(held, unsharded, tokens, tmp_path):
    content, put_back = unsharded
    content["optimizer"] = held
    put_back()
    refused(tmp_path, "native", configuration(tmp_path, tokens, "zero0"), "no optimizer state of fp32 .* under ZeRO-1")


@pytest.mark.parametrize(
    "file",
    ["zero_pp_rank_0_mp_rank_01_optim_states.pt", "layer_00-model_00-model_states.pt", "mp_rank_01_model_states.pt"],
)
def test_what_was_cut_over_the_model_names_the_way_through_a_universal_checkpoint(file, copied, config):
    (copied / "native" / file).touch()
    refused(copied, "native", config, "tensor or pipeline parallelism; make a universal checkpoint .*ds_to_universal")


@pytest.mark.parametrize("file", ["mp_rank_01_model_states.pt", "layer_00-model_states.pt"])
def test_what_was_cut_over_the_model_without_zero_names_both_steps(file, unsharded, tokens, tmp_path):
    (tmp_path / "native" / file).touch()
    refused(tmp_path, "native", configuration(tmp_path, tokens, "zero0"), "stage 1, save, .*ds_to_universal")


def test_muon_takes_no_moments_of_adam(copied, tokens):
    refused(copied, "native", run_config(copied / "unused", tokens, "optim.name=muon"), "set optim.name=adamw")


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(copied, config):
    file = copied / "native" / "mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=False)
    torch.save(content | {"client": Bomb(copied / "exploded")}, file)
    refused(copied, "native", config, f"{file}: holds posix.mkdir besides .* --trust")
    assert not (copied / "exploded").exists()
    import_deepspeed(copied / "native", into(config, copied / "run"), copied / "native")
    assert (copied / "exploded").exists()  # so it would have


class AsPython3112:
    """Is written as that Python writes a member of an enumeration."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_a_stage_as_older_pythons_write_it_is_read_and_no_other_attribute_is(copied, config):
    from deepspeed.runtime.zero.config import ZeroStageEnum

    file = sorted((copied / "native").glob("*_optim_states.pt"))[0]
    content = torch.load(file, weights_only=False)
    state = content["optimizer_state_dict"]
    stage = state["zero_stage"].name
    for owner, name in ((ZeroStageEnum, "__class__"), (torch.Tensor, "gradients")):
        state["zero_stage"] = AsPython3112(owner, name)
        torch.save(content, file)
        refused(copied, "native", config, f"{file}: holds .* besides .* --trust")
    state["zero_stage"] = AsPython3112(ZeroStageEnum, stage)
    torch.save(content, file)
    import_deepspeed(copied / "native", into(config, copied / "run"))
    assert CheckpointStore(copied / "run" / CHECKPOINTS).steps() == [FIRST]


def test_what_a_trainer_has_put_beside_is_read_from_a_trusted_folder_alone(copied, config, tokens):
    """As Megatron-DeepSpeed does with its arguments."""
    file = copied / "native" / "mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=False)
    torch.save(content | {"args": argparse.Namespace(lr=0.1)}, file)
    torch.serialization.add_safe_globals([argparse.Namespace])  # as libraries do that are imported meanwhile
    refused(copied, "native", config, "holds argparse.Namespace besides tensors .* name it again with --trust")
    words = ["checkpoint", "import-deepspeed", str(copied / "native")]
    words += run_words(copied / "run", tokens, "train.micro_batch_size=4")
    other = CliRunner().invoke(main, [*words, "--trust", str(copied)])
    assert other.exit_code == 2
    assert "name the same folder twice" in other.output
    done = CliRunner().invoke(main, [*words, "--trust", str(copied / "native")])
    assert done.exit_code == 0, done.output
    assert "28 tensors after 3 steps" in done.output
    assert tensors_of(CheckpointStore(copied / "run" / CHECKPOINTS).step_dir(FIRST))


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_hugging_face_model_that_deepspeed_trained(family, tmp_path, tokens):
    """Names, transposed matrices and fused projections, of weights and of moments."""
    folder = tmp_path / "theirs"
    start(save_a_hugging_face_model, 2, family, folder, {"epoch": 1}, log=tmp_path / "log").finish()
    model = model_from_hf_config(json.loads((folder / "config" / "config.json").read_text()), "config.json")
    base = run_config(tmp_path / "run", tokens)
    config = TrainingRun.model_validate_json(json.dumps({**json.loads(base.model_dump_json()),
                                                         "model": json.loads(model.model_dump_json())}))  # fmt: skip
    said = import_deepspeed(folder, config)
    assert "after 3 steps" in said
    found = tensors_of(CheckpointStore(tmp_path / "run" / CHECKPOINTS).step_dir(3))
    theirs = torch.load(folder / "state.pt")
    for index, kind in enumerate(KINDS):
        expected = hf_state_to_model(model, {name: values[index] for name, values in theirs.items()})
        for name in {key.partition("|")[0] for key in found}:
            assert torch.equal(found[f"{name}|{kind}"], expected[name].float()), (name, kind)
