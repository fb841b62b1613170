"""Weights to and from Hugging Face: their models are the oracle for ours, in both directions."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megagpt.checkpoint.hf import export_hf, hf_state_to_model, import_hf, model_to_hf_state
from megagpt.config.schema import GPT2Model, LlamaModel
from megagpt.errors import CheckpointError
from megagpt.generate import generate
from megagpt.model.build import build_model
from megagpt.model.init import init_weights
from megagpt.model.loss import next_token_nll

STORIES = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "models" / "stories260K"


def hf_gpt2(**change):
    sizes = {"vocab_size": 61, "n_positions": 23, "n_embd": 36, "n_layer": 3, "n_head": 3}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **change))


def hf_llama(cls=LlamaForCausalLM, config_cls=LlamaConfig, **change):
    sizes = {
        "vocab_size": 61,
        "hidden_size": 36,
        "intermediate_size": 53,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 23,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return cls(config_cls(**{**sizes, **change}))


THEIRS = {
    "gpt2": lambda: hf_gpt2(),
    "gpt2-no-dropout": lambda: hf_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "llama-gqa-untied": lambda: hf_llama(),
    "llama-mha-tied": lambda: hf_llama(num_key_value_heads=6, tie_word_embeddings=True),
    "llama-mqa": lambda: hf_llama(num_key_value_heads=1),
    "qwen3-qk-norm": lambda: hf_llama(Qwen3ForCausalLM, Qwen3Config),
}

OURS = {
    "gpt2": GPT2Model(family="gpt2", n_layer=3, n_head=3, d_model=36, vocab_size=61, max_seq_len=23, dropout=0.1),
    "llama": LlamaModel(
        family="llama",
        n_layer=3,
        n_head=6,
        n_kv_head=2,
        d_model=36,
        d_ff=53,
        vocab_size=61,
        max_seq_len=23,
        norm_eps=2e-5,
        rope_theta=700.0,
    ),
}
OURS["llama-tied"] = OURS["llama"].model_copy(update={"tied_head": True})
OURS["llama-qk-norm"] = OURS["llama"].model_copy(update={"qk_norm": True})


def randomise(model):
    """Every parameter random, norms and biases too, so that none can be mixed up unnoticed."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.dim() == 1 and "bias" not in name else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def imported(folder):
    config, state = import_hf(folder)
    model = build_model(config)
    model.load_state_dict(state)
    return config, model.eval()


def batch():
    return torch.randint(61, (2, 23), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=THEIRS)
def theirs(request, tmp_path):
    model = randomise(THEIRS[request.param]())
    model.save_pretrained(tmp_path / "hf")
    return model, tmp_path / "hf"


def test_imported_logits_equal_hugging_faces(theirs):
    model, folder = theirs
    _, ours = imported(folder)
    torch.testing.assert_close(ours(batch()), model(batch()).logits, rtol=1e-5, atol=1e-5)


def test_imported_gradients_equal_hugging_faces(theirs):
    model, folder = theirs
    config, ours = imported(folder)
    tokens = batch()
    (next_token_nll(ours(tokens[:, :-1]), tokens[:, 1:]) / tokens[:, 1:].numel()).backward()
    model(tokens, labels=tokens).loss.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    converted = model_to_hf_state(config, gradients)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert converted.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            converted[name], gradient, rtol=1e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_import_then_export_gives_back_the_same_files(theirs, tmp_path):
    _, folder = theirs
    config, ours = imported(folder)
    export_hf(ours, config, None, tmp_path / "back")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert import_hf(tmp_path / "back")[0] == config


@pytest.mark.parametrize("name", OURS)
def test_exported_model_gives_our_logits_in_transformers(name, tmp_path):
    model = randomise(build_model(OURS[name]))
    export_hf(model, OURS[name], None, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(theirs(batch()).logits, model(batch()), rtol=1e-5, atol=1e-5)
    assert import_hf(tmp_path / "out")[0] == OURS[name]


@pytest.mark.parametrize("name", OURS)
def test_state_survives_both_conversions_bit_for_bit(name):
    model = build_model(OURS[name])
    init_weights(model, 0)
    state = model.state_dict()
    back = hf_state_to_model(OURS[name], model_to_hf_state(OURS[name], state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_exported_tokenizer_and_type_are_found(tmp_path):
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    state = {name: tensor.bfloat16() for name, tensor in build_model(OURS["llama"]).state_dict().items()}
    export_hf(state, OURS["llama"], tmp_path / "tokenizer.json", tmp_path / "out", eot_id=2)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("ab")["input_ids"] == [0, 1]
    assert loaded.eos_token_id == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype is torch.bfloat16
    assert model.config.eos_token_id == 2


def test_several_files_with_an_index_and_names_without_prefix_are_read(tmp_path):
    model = randomise(hf_gpt2())
    tensors = {name.removeprefix("transformer."): p.detach().clone() for name, p in model.named_parameters()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 23, 23)  # the mask that OpenAI's files on the hub carry
    names = sorted(tensors)
    files = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model.config.save_pretrained(tmp_path)
    _, ours = imported(tmp_path)
    torch.testing.assert_close(ours(batch()), model(batch()).logits, rtol=1e-5, atol=1e-5)


def test_old_configurations_with_rope_theta_at_the_top_are_read(tmp_path):
    model = randomise(hf_llama())
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, rope_parameters=None, rope_theta=5000.0, rope_scaling=None, head_dim=None)
    _, ours = imported(tmp_path)
    torch.testing.assert_close(ours(batch()), model(batch()).logits, rtol=1e-5, atol=1e-5)


def edit_config(folder, **change):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True cannot be"),
        ("gpt2", {"activation_function": "relu"}, "activation_function = 'relu' cannot be expressed; only 'gelu_new'"),
        ("gpt2", {"n_inner": 100}, "n_inner = 100 cannot be expressed; only None or 144 can"),
        ("gpt2", {"attn_pdrop": 0.3}, "one dropout for all"),
        ("gpt2", {"model_type": "bloom"}, "model_type 'bloom' cannot be imported; known: gpt2, llama, qwen3"),
        ("gpt2", {"n_head": 5}, r"d_model \(36\) must be a multiple of n_head \(5\)"),
        ("gpt2", {"n_layer": 2}, "unknown tensors: transformer.h.2"),
        ("gpt2", {"n_layer": 4}, "missing tensors: transformer.h.3"),
        ("gpt2", {"vocab_size": 62}, r"embedding.tokens.weight has shape \(61, 36\), but config.json says \(62, 36\)"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 32.0}}, "rope_scaling .*llama3.*only rope_type"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_parameters .*yarn"),
        ("llama", {"attention_bias": True}, "attention_bias = True cannot be expressed; only False can"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' cannot be expressed"),
        ("llama", {"head_dim": 8}, "head_dim 8 x num_attention_heads 6 is not hidden_size 36"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(family, change, message, tmp_path):
    (hf_gpt2() if family == "gpt2" else hf_llama()).save_pretrained(tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(CheckpointError, match=message):
        import_hf(tmp_path)


def test_a_missing_size_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_embd": 36, "n_head": 3, "vocab_size": 5}')
    with pytest.raises(CheckpointError, match=r"config\.json: n_layer is missing"):
        import_hf(tmp_path)


def test_pickles_missing_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        import_hf(tmp_path)
    hf_gpt2().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a complete safetensors file"):
        import_hf(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        import_hf(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle.*convert it to model\.safetensors"):
        import_hf(tmp_path)


def test_a_head_that_should_be_tied_but_differs_is_refused():
    state = {name: p.detach() for name, p in randomise(hf_gpt2()).named_parameters()}
    state["lm_head.weight"] = state["transformer.wte.weight"] + 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding"):
        hf_state_to_model(OURS["gpt2"], state)


def test_an_export_never_overwrites_and_leaves_nothing_half_written(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        export_hf(build_model(OURS["gpt2"]), OURS["gpt2"], None, tmp_path / "out")
    with pytest.raises(CheckpointError, match="unknown tensors: blocks"):
        export_hf(build_model(OURS["gpt2"]), OURS["gpt2"].model_copy(update={"n_layer": 1}), None, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def llama2c_model(file: Path):
    """karpathy's llama2.c legacy format: seven int32, then fp32 tensors, rotary pairs interleaved."""
    raw = file.read_bytes()
    dim, d_ff, n_layer, n_head, n_kv_head, vocab, seq_len = struct.unpack("7i", raw[:28])
    values, at = np.frombuffer(raw, dtype="<f4", offset=28), 0

    def take(*shape):
        nonlocal at
        at += (count := int(np.prod(shape)))
        return torch.from_numpy(values[at - count : at].reshape(shape).copy())

    def half_split(rows, heads):  # even rows of each head first, then odd
        return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    kv_dim = dim // n_head * n_kv_head
    embedding, attention_norm = take(vocab, dim), take(n_layer, dim)
    q, k, v = take(n_layer, dim, dim), take(n_layer, kv_dim, dim), take(n_layer, kv_dim, dim)
    output, feed_forward_norm = take(n_layer, dim, dim), take(n_layer, dim)
    gate, down, up = take(n_layer, d_ff, dim), take(n_layer, dim, d_ff), take(n_layer, d_ff, dim)
    state = {"embedding.tokens.weight": embedding, "head.weight": embedding, "final_norm.weight": take(dim)}
    for layer in range(n_layer):
        qkv = [half_split(q[layer], n_head), half_split(k[layer], n_kv_head), v[layer]]
        state |= {
            f"blocks.{layer}.attention_norm.weight": attention_norm[layer],
            f"blocks.{layer}.attention.qkv.weight": torch.cat(qkv),
            f"blocks.{layer}.attention.output.weight": output[layer],
            f"blocks.{layer}.feed_forward_norm.weight": feed_forward_norm[layer],
            f"blocks.{layer}.feed_forward.gate_up.weight": torch.cat([gate[layer], up[layer]]),
            f"blocks.{layer}.feed_forward.down.weight": down[layer],
        }
    config = LlamaModel(
        family="llama",
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_kv_head,
        d_model=dim,
        d_ff=d_ff,
        vocab_size=vocab,
        max_seq_len=seq_len,
        tied_head=True,
    )
    model = build_model(config)
    model.load_state_dict(state)
    return model.eval()


def llama2c_tokens(file: Path, n_tokens: int) -> list[bytes]:
    raw, at, pieces = file.read_bytes(), 4, []
    for _ in range(n_tokens):
        _, length = struct.unpack_from("<fi", raw, at)
        pieces.append(raw[at + 8 : at + 8 + length])
        at += 8 + length
    return pieces


@pytest.mark.skipif(not STORIES.exists(), reason="the stories260K model is not beside this checkout")
def test_a_trained_model_tells_its_story():
    model = llama2c_model(STORIES / "stories260K.bin")
    pieces = llama2c_tokens(STORIES / "tok512.bin", 512)
    (tokens,) = generate(model, [[1]], 60)
    text = b"".join(pieces[token] for token in tokens).decode().strip()
    assert text.startswith("Once upon a time, there was a little girl named Lily")
