"""GGUF files of tiny models, written with the `gguf` package: what tests import."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

TEXT = [
    "The quick brown fox jumps over the lazy dog, then sleeps under the old apple tree until Tuesday the 24th.",
    "Question: How many legs do 12 dogs have? Answer: 48. It's what they've said; we'll see.",
    "1234567 1234567 1234567 1234567 1234567 1234567 1234567",
    "def f(x):\n    return x + 1\n\n\nclass A:\n    pass\n",
    "Ein größeres Haus; 東京は大きい。 Привет, мир! 👩‍👩‍👧 e\u0301",
]
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(pre: str) -> Any:
    """The pre-tokeniser that llama.cpp's name stands for."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "gpt-2":
        return plain
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    from tokenizers import Regex

    split = pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def trained(pre: str, vocab_size: int = 384) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level(pre)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=list(CONTROL),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    return tokenizer


def tokenizer_keys(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    content = json.loads(tokenizer.to_str())
    special = {token["id"] for token in content["added_tokens"]}
    tokens = sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in tokens],
        "tokenizer.ggml.token_type": [3 if i in special else 1 for _, i in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": np.uint32(1),
        "tokenizer.ggml.eos_token_id": np.uint32(2),
        "tokenizer.ggml.add_bos_token": False,
    }


def hf_llama(**change: Any) -> LlamaForCausalLM:
    """Every parameter random, norms too, so that none can be mixed up unnoticed."""
    sizes = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **change}))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter.dim() == 1) + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """llama.cpp's names and order of rows."""
    heads = {"q": model.config.num_attention_heads, "k": model.config.num_key_value_heads}
    tensors = {}
    for name, parameter in model.named_parameters():
        rows = parameter.detach().numpy()
        short = name.removesuffix(".weight")
        if short.startswith("model.layers."):
            layer, _, short = short.removeprefix("model.layers.").partition(".")
            if short in ("self_attn.q_proj", "self_attn.k_proj"):  # `permute` of convert_hf_to_gguf.py
                n_head = heads[short[len("self_attn.")]]
                halves = rows.reshape(n_head, 2, rows.shape[0] // n_head // 2, rows.shape[1])
                rows = halves.swapaxes(1, 2).reshape(rows.shape)
            tensors[f"blk.{layer}.{NAMES[short]}.weight"] = rows
        else:
            tensors[f"{NAMES[short]}.weight"] = rows
    return tensors


def llama_keys(model: LlamaForCausalLM) -> dict[str, Any]:
    config = model.config
    return {
        "llama.block_count": np.uint32(config.num_hidden_layers),
        "llama.context_length": np.uint32(config.max_position_embeddings),
        "llama.embedding_length": np.uint32(config.hidden_size),
        "llama.feed_forward_length": np.uint32(config.intermediate_size),
        "llama.attention.head_count": np.uint32(config.num_attention_heads),
        "llama.attention.head_count_kv": np.uint32(config.num_key_value_heads),
        "llama.attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
        "llama.rope.freq_base": np.float32(config.rope_parameters["rope_theta"]),
        "llama.rope.dimension_count": np.uint32(config.hidden_size // config.num_attention_heads),
        "llama.vocab_size": np.uint32(config.vocab_size),
    }


def write_gguf(
    file: Path,
    keys: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    kind: str = "F32",
    architecture: str = "llama",
    raw: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Matrices in the type of that name, vectors in F32; keys that are None are left out, `raw` are blocks as bytes."""
    writer = gguf.GGUFWriter(file, architecture)
    add = {
        np.uint32: writer.add_uint32,
        np.float32: writer.add_float32,
        bool: writer.add_bool,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in keys.items():
        if value is not None:
            add[type(value)](key, value if isinstance(value, bool | str | list) else value.item())
    ggml_type = gguf.GGMLQuantizationType[kind]
    for name, values in tensors.items():
        if raw is not None and name in raw:
            writer.add_tensor(name, raw[name], raw_dtype=ggml_type)
        elif values.ndim == 1 or kind == "F32":
            writer.add_tensor(name, values.astype(np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, ggml_type), raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_model(
    file: Path, model: LlamaForCausalLM, pre: str = "smollm", kind: str = "F32", change: Mapping[str, Any] | None = None
) -> Path:
    """A whole file; `change` are keys to add, replace or (None) leave out."""
    keys = llama_keys(model) | tokenizer_keys(trained(pre), pre) | dict(change or {})
    return write_gguf(file, keys, gguf_tensors(model), kind)


def hostile_texts() -> Sequence[str]:
    """Texts on which tokenizers like to differ."""
    return [
        *TEXT,
        "",
        " ",
        "   ",
        "\n\n\n 1",
        "a   12 345  6789\n\n1\t2",
        "1234567890 ½ Ⅷ ٣٤ 一二三 ²",
        "  leading and trailing  ",
        "tabs\tand\r\nlines\r\r\n \n",
        "<|endoftext|><|im_start|>user\nhi<|im_end|>",
        "<|im_sta" + "rt|> <|endoftext",
        "don't DON'T we'LL I'Ve ''s",
        "\u00a0\u2003\u3000x\u200b\ufeff",
        "\x00\x01\x7f\x80",
        "🏳️‍🌈🇩🇪 नमस्ते ไทย עברית",
        "a" * 300,
        "!?...---===###",
    ]
