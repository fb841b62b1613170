"""Llama, to be read from top to bottom: rotary positions, RMSNorm, SwiGLU, grouped-query attention, no biases.

Single device: parallelism is applied from outside. Letters as in `megagpt.model.layers`.
Source: Touvron et al. 2023, section 2.2; optional norm of queries and keys: Dehghani et al. 2023, section 2.1, with
the weights shared by the heads as in Qwen3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megagpt.model.context import WHOLE_ROWS, Context
from megagpt.model.layers import Attention, AttentionCore, Block, Embedding, Step
from megagpt.model.rotary import Rotary


class LlamaEmbedding(Embedding):
    """Token vectors; positions enter in the attention."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, d_model)

    def forward(self, tokens: Tensor, *, context: Context = WHOLE_ROWS) -> Tensor:  # noqa: ARG002
        """(B, T) int64 -> (B, T, C)."""
        return self.tokens(tokens)

    def at(self, tokens: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002
        """(B, T) tokens -> (B, T, C), the same at every position."""
        return self.tokens(tokens)


class QKNorm(nn.Module):
    """RMSNorm over each query and key head, before the rotation; one weight for queries, one for keys."""

    def __init__(self, n_head: int, n_kv_head: int, d_head: int, eps: float) -> None:
        super().__init__()
        self.n_head = n_head
        self.n_kv_head = n_kv_head
        self.eps = eps
        self.query_weight = nn.Parameter(torch.ones(d_head))
        self.key_weight = nn.Parameter(torch.ones(d_head))

    def forward(self, qk: Tensor) -> Tensor:
        """(B, T, H + K, D), queries first -> the same shape."""
        query_weights = self.query_weight.expand(self.n_head, -1)
        key_weights = self.key_weight.expand(self.n_kv_head, -1)
        return F.rms_norm(qk, qk.shape[-1:], eps=self.eps) * torch.cat((query_weights, key_weights))


class LlamaAttention(Attention):
    """Grouped-query self-attention. Rows of `qkv`: H * D of q, K * D of k, K * D of v; heads in order inside each."""

    def __init__(self, d_model: int, n_head: int, n_kv_head: int, rotary: Rotary, qk_norm: nn.Module) -> None:
        super().__init__()
        self.n_head = n_head
        self.n_kv_head = n_kv_head
        self.d_head = d_model // n_head
        self.qkv = nn.Linear(d_model, (n_head + 2 * n_kv_head) * self.d_head, bias=False)
        self.qk_norm = qk_norm
        self.rotary = rotary
        self.core = AttentionCore(n_head, n_kv_head)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, *, context: Context = WHOLE_ROWS) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        qk, v = self._project(x)
        # Queries and keys are turned together: one set of kernels instead of two.
        q, k = torch.split(self.rotary(qk, context=context), [self.n_head, self.n_kv_head], dim=2)
        return self.output(self.core(q, k, v, context.visible))

    def decode(self, x: Tensor, step: Step, layer: int) -> Tensor:
        """(B, T, C) new tokens -> (B, T, C)."""
        qk, v = self._project(x)
        q, k = torch.split(self.rotary.at(qk, step.positions), [self.n_head, self.n_kv_head], dim=2)
        return self.output(step.attend(layer, q, k, v))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normed (B, T, H + K, D) queries and keys, and (B, T, K, D) values."""
        heads = self.qkv(x).unflatten(-1, (-1, self.d_head))
        qk, v = torch.split(heads, [self.n_head + self.n_kv_head, self.n_kv_head], dim=2)
        # A view of v, kept for backward, would keep all of the product; turned q and k are new tensors anyway.
        return self.qk_norm(qk), v.contiguous()


class LlamaFeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Rows of `gate_up`: F of gate, then F of up.

    Source: Shazeer 2020, section 2.
    """

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def llama_block(attention: LlamaAttention, d_model: int, d_ff: int, norm_eps: float) -> Block:
    """One pre-norm block of Llama around its attention."""
    return Block(
        attention_norm=nn.RMSNorm(d_model, eps=norm_eps),
        attention=attention,
        feed_forward_norm=nn.RMSNorm(d_model, eps=norm_eps),
        feed_forward=LlamaFeedForward(d_model, d_ff),
    )
