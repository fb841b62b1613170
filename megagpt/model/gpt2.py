"""GPT-2, to be read from top to bottom: learned positions, LayerNorm, GELU, biases, tied head.

Single device: parallelism is applied from outside. Letters as in `megagpt.model.layers`.
Source: Radford et al. 2019, section 2.3, and OpenAI's published code (src/model.py).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from megagpt.model.context import WHOLE_ROWS, Context
from megagpt.model.layers import Attention, AttentionCore, Block, Embedding, Step, dropout_layer


class GPT2Embedding(Embedding):
    """Token vector plus position vector."""

    def __init__(self, vocab_size: int, max_seq_len: int, d_model: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.positions = nn.Embedding(max_seq_len, d_model)
        self.dropout = dropout_layer(dropout)

    def forward(self, tokens: Tensor, *, context: Context = WHOLE_ROWS) -> Tensor:
        """(B, T) int64 -> (B, T, C)."""
        # Through the module, not by slicing its weight: ZeRO-3 gathers a weight when its module is called.
        T = tokens.shape[1]
        here = slice(self.stretch * T, (self.stretch + 1) * T)
        positions = self.positions(context.positions(here, tokens.device))
        return self.dropout(self.tokens(tokens) + positions)

    def at(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """(B, T) tokens at (B, T) positions -> (B, T, C)."""
        return self.tokens(tokens) + self.positions(positions)


class GPT2Attention(Attention):
    """Multi-head self-attention. Rows of `qkv`: H * D of q, then of k, then of v; heads in order inside each."""

    def __init__(self, d_model: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.n_head = n_head
        self.n_kv_head = n_head
        self.d_head = d_model // n_head
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.core = AttentionCore(n_head, n_head, dropout)
        self.output = nn.Linear(d_model, d_model)
        self.dropout = dropout_layer(dropout)

    def forward(self, x: Tensor, *, context: Context = WHOLE_ROWS) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        q, k, v = self._project(x)
        return self.dropout(self.output(self.core(q, k, v, context.visible)))

    def decode(self, x: Tensor, step: Step, layer: int) -> Tensor:
        """(B, T, C) new tokens -> (B, T, C)."""
        q, k, v = self._project(x)
        return self.output(step.attend(layer, q, k, v))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Three views into one product, each (B, T, H, D)."""
        return self.qkv(x).unflatten(-1, (3, self.n_head, self.d_head)).unbind(2)


class GPT2FeedForward(nn.Module):
    """Two linear maps, four times as wide between them, with the tanh approximation of GELU."""

    def __init__(self, d_model: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, 4 * d_model)
        self.down = nn.Linear(4 * d_model, d_model)
        self.dropout = dropout_layer(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.dropout(self.down(F.gelu(self.up(x), approximate="tanh")))


def gpt2_block(d_model: int, n_head: int, norm_eps: float, dropout: float) -> Block:
    """One pre-norm block of GPT-2."""
    return Block(
        attention_norm=nn.LayerNorm(d_model, eps=norm_eps),
        attention=GPT2Attention(d_model, n_head, dropout),
        feed_forward_norm=nn.LayerNorm(d_model, eps=norm_eps),
        feed_forward=GPT2FeedForward(d_model, dropout),
    )
