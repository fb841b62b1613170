"""Model configuration -> model. The only place in this package's layers where a configuration is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from megagpt.config.schema import GPT2Model, LlamaModel
from megagpt.model.decoder import Decoder, DecoderSizes
from megagpt.model.gpt2 import GPT2Embedding, gpt2_block
from megagpt.model.llama import LlamaAttention, LlamaEmbedding, QKNorm, llama_block
from megagpt.model.rotary import Rotary


def build_model(config: GPT2Model | LlamaModel) -> Decoder:
    """The model on the ambient device, with PyTorch's own initial values: `init_weights` gives it ours.

    Under `with torch.device("meta"):` nothing is allocated; then `model.to_empty(device=...)` and `init_weights`.
    """
    return FAMILIES[config.family](config)


def _build_gpt2(config: GPT2Model) -> Decoder:
    sizes = DecoderSizes(
        vocab_size=config.vocab_size,
        max_seq_len=config.max_seq_len,
        n_layer=config.n_layer,
        d_model=config.d_model,
        n_kv_head=config.n_head,
        d_head=config.d_model // config.n_head,
    )
    embedding = GPT2Embedding(config.vocab_size, config.max_seq_len, config.d_model, config.dropout)
    blocks = [gpt2_block(config.d_model, config.n_head, config.norm_eps, config.dropout) for _ in range(config.n_layer)]
    return Decoder(embedding, blocks, nn.LayerNorm(config.d_model, eps=config.norm_eps), sizes, tied_head=True)


def _build_llama(config: LlamaModel) -> Decoder:
    sizes = DecoderSizes(
        vocab_size=config.vocab_size,
        max_seq_len=config.max_seq_len,
        n_layer=config.n_layer,
        d_model=config.d_model,
        n_kv_head=config.n_kv_head,
        d_head=config.d_model // config.n_head,
    )
    rotary = Rotary(sizes.d_head, config.max_seq_len, config.rope_theta)
    embedding = LlamaEmbedding(config.vocab_size, config.d_model)
    blocks = []
    for _ in range(config.n_layer):
        qk_norm = (
            QKNorm(config.n_head, config.n_kv_head, sizes.d_head, config.norm_eps) if config.qk_norm else nn.Identity()
        )
        attention = LlamaAttention(config.d_model, config.n_head, config.n_kv_head, rotary, qk_norm)
        blocks.append(llama_block(attention, config.d_model, config.d_ff, config.norm_eps))
    final_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return Decoder(embedding, blocks, final_norm, sizes, tied_head=config.tied_head)


FAMILIES: dict[str, Callable[[Any], Decoder]] = {
    "gpt2": _build_gpt2,
    "llama": _build_llama,
}
"""`model.family` -> who builds it. A new family is one file, one function here and one line."""
