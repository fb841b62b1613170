"""config.json of Hugging Face <-> our model section. Every key that could change the result is checked by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megagpt.config.schema import GPT2Model, LlamaModel
from megagpt.errors import CheckpointError

ModelConfig = GPT2Model | LlamaModel


def model_to_hf_config(config: ModelConfig, dtype: str, eot_id: int | None) -> dict[str, Any]:
    """config.json of this model; with QK-norm a Llama is what Hugging Face calls Qwen3."""
    common = {"dtype": dtype, "bos_token_id": eot_id, "eos_token_id": eot_id, "vocab_size": config.vocab_size}
    if isinstance(config, GPT2Model):
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.d_model,
            "n_positions": config.max_seq_len,
            "layer_norm_epsilon": config.norm_eps,
            "activation_function": "gelu_new",
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
            "tie_word_embeddings": True,
            **common,
        }
    return {
        "model_type": "qwen3" if config.qk_norm else "llama",
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.d_model // config.n_head,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,  # read by transformers before 5
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "tie_word_embeddings": config.tied_head,
        **common,
    }


def model_from_hf_config(theirs: Mapping[str, Any], where: str) -> ModelConfig:
    """Our model section from a config.json.

    Args:
        theirs: its content.
        where: its path, for messages.

    Raises:
        CheckpointError: another model type, a key whose value cannot be expressed, or a missing size.
    """
    model_type = theirs.get("model_type")
    try:
        if model_type == "gpt2":
            return _gpt2(theirs, where)
        if model_type in ("llama", "qwen3"):
            return _llama(theirs, where)
    except KeyError as error:
        raise CheckpointError(f"{where}: {error.args[0]} is missing") from None
    except ValidationError as error:
        problem = error.errors()[0]
        raise CheckpointError(
            f"{where}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}, got {problem['input']!r}"
        ) from None
    raise CheckpointError(f"{where}: model_type {model_type!r} cannot be imported; known: gpt2, llama, qwen3")


_Refusals = Mapping[str, tuple[Any, ...]]

_GPT2_ONLY: _Refusals = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
"""Key -> the values that we can express. An absent key has Hugging Face's default, which is the first."""

_LLAMA_ONLY: _Refusals = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
}


def _gpt2(theirs: Mapping[str, Any], where: str) -> GPT2Model:
    d_model = theirs["n_embd"]
    _check_values(theirs, {**_GPT2_ONLY, "n_inner": (None, 4 * d_model)}, where)
    dropouts = [theirs.get(key, 0.1) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")]
    if len(set(dropouts)) > 1:
        raise CheckpointError(
            f"{where}: resid_pdrop, embd_pdrop, attn_pdrop are {dropouts}; one dropout for all can be expressed"
        )
    return GPT2Model(
        family="gpt2",
        n_layer=theirs["n_layer"],
        n_head=theirs["n_head"],
        d_model=d_model,
        vocab_size=theirs["vocab_size"],
        max_seq_len=theirs["n_positions"],
        norm_eps=theirs.get("layer_norm_epsilon", 1e-5),
        dropout=float(dropouts[0]),
    )


def _llama(theirs: Mapping[str, Any], where: str) -> LlamaModel:
    d_model, n_head = theirs["hidden_size"], theirs["num_attention_heads"]
    is_qwen3 = theirs["model_type"] == "qwen3"
    d_head = theirs.get("head_dim") or (128 if is_qwen3 else d_model // n_head)
    if d_head * n_head != d_model:
        raise CheckpointError(
            f"{where}: head_dim {d_head} x num_attention_heads {n_head} is not hidden_size {d_model}; "
            "only head_dim = hidden_size / num_attention_heads can be expressed"
        )
    _check_values(theirs, _LLAMA_ONLY, where)
    if set(theirs.get("layer_types") or ()) - {"full_attention"}:
        raise CheckpointError(f"{where}: layer_types {theirs['layer_types']!r}; only full_attention can be expressed")
    return LlamaModel(
        family="llama",
        n_layer=theirs["num_hidden_layers"],
        n_head=n_head,
        n_kv_head=theirs.get("num_key_value_heads") or n_head,
        d_model=d_model,
        d_ff=theirs["intermediate_size"],
        vocab_size=theirs["vocab_size"],
        max_seq_len=theirs["max_position_embeddings"],
        norm_eps=theirs.get("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(theirs, where),
        tied_head=theirs.get("tie_word_embeddings", False),
        qk_norm=is_qwen3,
    )


def _rope_theta(theirs: Mapping[str, Any], where: str) -> float:
    """Base of the rotary frequencies: in `rope_parameters` since transformers 5, before beside `rope_scaling`."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = theirs.get(key) or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise CheckpointError(f"{where}: {key} {rope!r}; only rope_type 'default' can be expressed")
    in_parameters = (theirs.get("rope_parameters") or {}).get("rope_theta")
    return float(in_parameters if in_parameters is not None else theirs.get("rope_theta", 10000.0))


def _check_values(theirs: Mapping[str, Any], allowed: _Refusals, where: str) -> None:
    for key, values in allowed.items():
        value = theirs.get(key, values[0])
        if value not in values:
            raise CheckpointError(
                f"{where}: {key} = {value!r} cannot be expressed; only {' or '.join(map(repr, values))} can"
            )
