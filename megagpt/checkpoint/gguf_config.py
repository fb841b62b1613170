"""A GGUF header -> our model section, and the tensors of that model. All that could change it is checked by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from megagpt.checkpoint.gguf_header import GGUFHeader
from megagpt.config.schema import LlamaModel
from megagpt.errors import CheckpointError

ARCHITECTURE = "llama"
EMBEDDING, HEAD, FINAL_NORM = "token_embd.weight", "output.weight", "output_norm.weight"

_KEYS = {
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_kv_head": "attention.head_count_kv",
    "d_model": "embedding_length",
    "d_ff": "feed_forward_length",
    "max_seq_len": "context_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
"""Our key -> theirs, behind `llama.`."""

_Values = tuple[Any, ...]


def llama_from_gguf(header: GGUFHeader, where: str) -> LlamaModel:
    """Our model section.

    Args:
        header: of the file.
        where: its path, for messages.

    Raises:
        CheckpointError: another architecture, a value that cannot be expressed, one that is not known here, or a
            missing size.
    """
    _check_general(header.metadata, where)
    theirs = {
        key.removeprefix(f"{ARCHITECTURE}."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{ARCHITECTURE}.")
    }
    if EMBEDDING not in header.tensors:
        raise CheckpointError(f"{where}: tensor {EMBEDDING} is missing")
    sizes: dict[str, Any] = {ours: _plain(key, theirs[key], where) for ours, key in _KEYS.items() if key in theirs}
    if "n_head" in sizes:
        sizes.setdefault("n_kv_head", sizes["n_head"])  # llama.cpp's defaults, these two
    sizes.setdefault("rope_theta", 10000.0)
    missing = [f"{ARCHITECTURE}.{key}" for ours, key in _KEYS.items() if ours not in sizes]
    if missing:
        raise CheckpointError(f"{where}: {', '.join(missing)} is missing")
    try:
        config = LlamaModel(
            family="llama",
            vocab_size=header.tensors[EMBEDDING].shape[0],
            tied_head=HEAD not in header.tensors,
            **sizes,
        )
    except ValidationError as error:
        problem = error.errors()[0]
        key = _KEYS.get(str(problem["loc"][0]), "") if problem["loc"] else ""
        raise CheckpointError(
            f"{where}: {ARCHITECTURE}.{key or '*'}: {problem['msg']}, got {str(problem['input'])[:400]}"
        ) from None
    _check_rest(theirs, config, where)
    return config


def expected_shapes(config: LlamaModel) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(GGUF's name, Hugging Face's name, shape) of every tensor of the model."""
    d, kv_rows = config.d_model, config.n_kv_head * (config.d_model // config.n_head)
    yield EMBEDDING, "model.embed_tokens.weight", (config.vocab_size, d)
    for layer in range(config.n_layer):
        gguf, theirs = f"blk.{layer}", f"model.layers.{layer}"
        yield f"{gguf}.attn_norm.weight", f"{theirs}.input_layernorm.weight", (d,)
        yield f"{gguf}.attn_q.weight", f"{theirs}.self_attn.q_proj.weight", (d, d)
        yield f"{gguf}.attn_k.weight", f"{theirs}.self_attn.k_proj.weight", (kv_rows, d)
        yield f"{gguf}.attn_v.weight", f"{theirs}.self_attn.v_proj.weight", (kv_rows, d)
        yield f"{gguf}.attn_output.weight", f"{theirs}.self_attn.o_proj.weight", (d, d)
        yield f"{gguf}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight", (d,)
        yield f"{gguf}.ffn_gate.weight", f"{theirs}.mlp.gate_proj.weight", (config.d_ff, d)
        yield f"{gguf}.ffn_up.weight", f"{theirs}.mlp.up_proj.weight", (config.d_ff, d)
        yield f"{gguf}.ffn_down.weight", f"{theirs}.mlp.down_proj.weight", (d, config.d_ff)
    yield FINAL_NORM, "model.norm.weight", (d,)
    if not config.tied_head:
        yield HEAD, "lm_head.weight", (config.vocab_size, d)


def check_tensors(header: GGUFHeader, config: LlamaModel, where: str) -> None:
    """The file has the tensors of this model, each in its shape, and no other.

    Raises:
        CheckpointError: naming a tensor, its shape, and what would be right.
    """
    if config.n_layer > len(header.tensors):  # before the names of so many layers are made
        raise CheckpointError(
            f"{where}: {ARCHITECTURE}.block_count = {config.n_layer}, but the file has {len(header.tensors)} tensors"
        )
    needed = {name: shape for name, _, shape in expected_shapes(config)}
    unknown = sorted(header.tensors.keys() - needed.keys())
    if unknown:
        hint = {"rope_freqs.weight": " (scaled rotary frequencies)"}.get(unknown[0], "")
        raise CheckpointError(
            f"{where}: tensor {unknown[0]}{hint} cannot be expressed, nor can {len(unknown) - 1} others; only Llama's "
            "weights without biases, experts or scaled positions can"
        )
    for name, shape in needed.items():
        if name not in header.tensors:
            raise CheckpointError(f"{where}: tensor {name} is missing")
        if header.tensors[name].shape != shape:
            raise CheckpointError(
                f"{where}: tensor {name} has the shape {header.tensors[name].shape}, but its metadata says {shape}"
            )


def _check_general(metadata: Mapping[str, Any], where: str) -> None:
    wanted: dict[str, _Values] = {
        "general.architecture": (ARCHITECTURE,),
        "general.type": ("model", None),
        "split.count": (1, 0, None),
    }
    for key, values in wanted.items():
        value = metadata.get(key)
        if _is_list(value) or value not in values:
            raise CheckpointError(f"{where}: {key} = {value!r} cannot be imported; only {values[0]!r} can")


def _check_rest(theirs: Mapping[str, Any], config: LlamaModel, where: str) -> None:
    """Every further key of the architecture leaves the model as it is."""
    d_head = config.d_model // config.n_head
    neutral: dict[str, _Values] = {
        "vocab_size": (config.vocab_size,),
        "attention.key_length": (d_head,),
        "attention.value_length": (d_head,),
        "attention.causal": (True,),
        "attention.sliding_window": (0,),
        "rope.dimension_count": (d_head,),
        "rope.scaling.type": ("none", "linear"),  # linear, by the factors below
        "rope.scaling.factor": (1.0, 0.0),
        "rope.scaling.attn_factor": (1.0,),
        "rope.scaling.finetuned": (False,),
        "rope.scale_linear": (1.0, 0.0),
        "expert_count": (0,),
        "expert_used_count": (0,),
        "tensor_data_layout": ("Meta AI original pth",),  # the order of q's and k's rows that is undone
    }
    for key, value in theirs.items():
        if key in _KEYS.values():
            continue
        name = f"{ARCHITECTURE}.{key}"
        if key not in neutral:
            raise CheckpointError(f"{where}: {name} = {_shown(value)} is not known here and may change the model")
        if _is_list(value) or value not in neutral[key]:
            only = " or ".join(map(repr, neutral[key]))
            raise CheckpointError(f"{where}: {name} = {_shown(value)} cannot be expressed; only {only} can")


def _plain(key: str, value: Any, where: str) -> Any:
    """A size as it stands, and a float32 as the shortest number that it is nearest to: 1e-05, not 9.99999974e-06."""
    name = f"{ARCHITECTURE}.{key}"
    if _is_list(value):
        raise CheckpointError(f"{where}: {name} = {_shown(value)}; only one value for all layers can be expressed")
    if not isinstance(value, float):
        return value  # the schema checks its type
    if not math.isfinite(value):
        raise CheckpointError(f"{where}: {name} = {value}; it must be finite")
    return float(str(np.float32(value)))


def _is_list(value: object) -> bool:
    return isinstance(value, list | np.ndarray)


def _shown(value: Any) -> str:
    return f"a list of {len(value)}" if _is_list(value) else repr(value)[:200]
