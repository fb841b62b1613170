"""Weights of GGUF files against the model that they were written from, and against transformers' own reader."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from megagpt.checkpoint.gguf_import import import_gguf
from megagpt.checkpoint.open import open_checkpoint
from megagpt.cli import main
from megagpt.errors import CheckpointError
from megagpt.generate import generate
from megagpt.model.build import build_model
from tests.checkpoint.gguf_files import gguf_tensors, hf_llama, llama_keys, write_gguf, write_model


def batch(vocab_size=384):
    return torch.randint(vocab_size, (2, 23), generator=torch.Generator().manual_seed(1))


def imported(file):
    config, state, _ = import_gguf(file)
    model = build_model(config)
    model.load_state_dict(state)
    return config, model.eval()


def transformers_reading(file):
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_word_embeddings": False, "num_key_value_heads": 4},
        {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    ],
    ids=["grouped-tied", "mha-untied", "mqa"],
)
def test_logits_are_those_of_the_model_that_was_written(change, tmp_path):
    theirs = hf_llama(**change)
    config, ours = imported(write_model(tmp_path / "m.gguf", theirs))
    torch.testing.assert_close(ours(batch()), theirs(batch()).logits, rtol=1e-5, atol=1e-5)
    assert config.tied_head == theirs.config.tie_word_embeddings
    assert config.norm_eps == theirs.config.rms_norm_eps
    assert config.max_seq_len == 96


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_logits_are_those_of_transformers_reading_of_the_same_file(kind, tmp_path):
    file = write_model(tmp_path / "m.gguf", hf_llama(), kind=kind)
    _, ours = imported(file)
    theirs = transformers_reading(file)(batch()).logits
    torch.testing.assert_close(ours(batch()), theirs, rtol=1e-5, atol=1e-5)
    assert theirs.std() > 0.1


@pytest.mark.parametrize(("kind", "block_bytes"), [("Q4_K", 144), ("Q6_K", 210)])
def test_blocks_of_other_types_are_read_as_transformers_does(kind, block_bytes, tmp_path):
    model = hf_llama(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    tensors, random = gguf_tensors(model), np.random.default_rng(0)
    raw = {  # no byte can be the upper one of an infinite float16
        name: random.integers(0, 256, (len(rows), rows.shape[1] // 256 * block_bytes), dtype=np.uint8) & 0x3B
        for name, rows in tensors.items()
        if rows.ndim == 2
    }
    file = write_gguf(tmp_path / "m.gguf", llama_keys(model), tensors, kind, raw=raw)
    _, state, _ = import_gguf(file)
    theirs = transformers_reading(file).state_dict()
    assert torch.equal(state["embedding.tokens.weight"], theirs["model.embed_tokens.weight"])
    qkv = torch.cat([theirs[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(state["blocks.0.attention.qkv.weight"], qkv)
    assert qkv.std() > 0


def test_the_command_makes_a_run_that_generates_with_the_files_tokenizer(tmp_path):
    theirs = hf_llama(tie_word_embeddings=False)
    file = write_model(tmp_path / "m.gguf", theirs, change={"tokenizer.chat_template": "{{ messages }}"})
    done = CliRunner().invoke(main, ["convert", "from-gguf", str(file), str(tmp_path / "run")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "step 0" in done.output
    assert "ends at token 0, which ends documents, not at the file's eos 2; its chat template is not" in done.output
    opened = open_checkpoint(tmp_path / "run")
    model, tokenizer = opened.load_model(), opened.tokenizer()
    torch.testing.assert_close(model(batch()), theirs(batch()).logits, rtol=1e-5, atol=1e-5)
    prompt = tokenizer.encode("The quick brown")
    greedy = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert generate(model, [prompt], 12)[0] == greedy[0, len(prompt) :].tolist()
    again = CliRunner().invoke(main, ["convert", "from-gguf", str(file), str(tmp_path / "run")])
    assert again.exit_code == 2
    assert "holds checkpoints already" in again.output


def test_without_the_gguf_package_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    file = write_model(tmp_path / "m.gguf", hf_llama())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"gguf package, which is not installed; pip install 'megagpt\[gguf\]'"):
        import_gguf(file)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.type", "adapter", "general.type = 'adapter' cannot be imported; only 'model' can"),
        ("split.count", np.uint32(3), "split.count = 3 cannot be imported; only 1 can"),
        ("llama.rope.scaling.type", "yarn", "rope.scaling.type = 'yarn' cannot be expressed; only 'none' or 'linear'"),
        ("llama.rope.scaling.factor", np.float32(4), "rope.scaling.factor = 4.0 cannot be expressed; only 1.0 or 0.0"),
        ("llama.attention.sliding_window", np.uint32(64), "attention.sliding_window = 64 cannot be expressed"),
        ("llama.attention.causal", False, "attention.causal = False cannot be expressed"),
        ("llama.expert_count", np.uint32(8), "expert_count = 8 cannot be expressed; only 0 can"),
        ("llama.attention.key_length", np.uint32(32), "attention.key_length = 32 cannot be expressed; only 16 can"),
        ("llama.rope.dimension_count", np.uint32(8), "rope.dimension_count = 8 cannot be expressed; only 16 can"),
        ("llama.vocab_size", np.uint32(400), "vocab_size = 400 cannot be expressed; only 384 can"),
        ("llama.logit_scale", np.float32(8), "llama.logit_scale = 8.0 is not known here and may change the model"),
        ("llama.feed_forward_length", [96, 96], "llama.feed_forward_length = a list of 2; only one value for all"),
        ("llama.feed_forward_length", np.uint32(64), r"ffn_gate.* shape \(96, 64\), but its metadata says \(64, 64\)"),
        ("llama.attention.head_count", np.uint32(5), r"d_model \(64\) must be a multiple of n_head \(5\)"),
        ("llama.attention.head_count", "4", "llama.attention.head_count: .*valid integer, got 4"),
        ("llama.block_count", np.uint32(1), "tensor blk.1.attn_k.weight cannot be expressed, nor can 8 others"),
        ("llama.block_count", np.uint32(3), "tensor blk.2.attn_norm.weight is missing"),
        ("llama.block_count", np.uint32(2**32 - 1), "block_count = 4294967295, but the file has 20 tensors"),
        ("llama.context_length", None, "llama.context_length is missing"),
        (
            "llama.attention.layer_norm_rms_epsilon",
            np.float32("nan"),
            "layer_norm_rms_epsilon = nan; it must be finite",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(key, value, message, tmp_path):
    file = write_model(tmp_path / "m.gguf", hf_llama(), change={key: value})
    with pytest.raises(CheckpointError, match=message) as error:
        import_gguf(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rope_freqs.weight", "tensor rope_freqs.weight .scaled rotary frequencies. cannot be expressed"),
        ("blk.1.attn_q.bias", "tensor blk.1.attn_q.bias cannot be expressed"),
        ("blk.0.ffn_gate_inp.weight", "tensor blk.0.ffn_gate_inp.weight cannot be expressed"),
    ],
)
def test_tensors_of_another_model_are_refused_by_name(name, message, tmp_path):
    model = hf_llama()
    tensors = gguf_tensors(model) | {name: np.ones(64, np.float32)}
    with pytest.raises(CheckpointError, match=message):
        import_gguf(write_gguf(tmp_path / "m.gguf", llama_keys(model), tensors))


def test_another_architecture_and_numbers_that_are_none_are_refused(tmp_path):
    model = hf_llama()
    keys, tensors = llama_keys(model), gguf_tensors(model)
    with pytest.raises(CheckpointError, match=r"general\.architecture = 'qwen2' cannot be imported; only 'llama' can"):
        import_gguf(write_gguf(tmp_path / "a.gguf", keys, tensors, architecture="qwen2"))
    tensors["blk.1.ffn_up.weight"] = np.full_like(tensors["blk.1.ffn_up.weight"], np.inf)
    with pytest.raises(CheckpointError, match=r"tensor blk\.1\.ffn_up\.weight holds values that are not finite"):
        import_gguf(write_gguf(tmp_path / "b.gguf", keys, tensors))


def test_keys_that_leave_the_model_as_it_is_are_accepted(tmp_path):
    change = {
        "general.name": "tiny",
        "llama.rope.scaling.type": "none",
        "llama.attention.key_length": np.uint32(16),
        "llama.expert_count": np.uint32(0),
        "quantize.imatrix.file": "x.dat",
    }
    plain, more = (write_model(tmp_path / f"{i}.gguf", hf_llama(), change=c) for i, c in enumerate(({}, change)))
    (config, state, _), (other_config, other_state, _) = import_gguf(plain), import_gguf(more)
    assert config == other_config
    assert all(torch.equal(state[name], other_state[name]) for name in state)
