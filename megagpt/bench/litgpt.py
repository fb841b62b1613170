"""A loop equivalent to litgpt's `litgpt pretrain`, written from its documentation; none of its code.

As documented (tutorials/pretrain.md, the options of `pretrain` and the model's configuration): rotary positions in
every model, one product for q, k and v; LayerNorm and a tanh-GELU feed-forward with biases, or RMSNorm in fp32 and
SwiGLU in three matrices; precision `bf16-mixed`, its default on a GPU that can: fp32 weights under autocast, logits
turned into fp32; the loss over chunks of 128 tokens; AdamW (fused on a GPU), the norm clipped at 1.0 with a check for
numbers that are not finite, the loss asked for at every step. Where `train.compile` is true the whole model is
compiled, as it always does. The head is tied where the configuration's is: the same sizes for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megagpt.bench.loop import inputs_and_targets
from megagpt.config.schema import GPT2Model, LlamaModel, TrainingRun

_CLIP = 1.0
_CHUNK = 128
_IGNORED = -100


class LitRMSNorm(nn.Module):
    """RMSNorm that computes in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (normed * self.weight.float()).to(x.dtype)


class LitGELU(nn.Module):
    """Two maps with biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))  # type: ignore[no-any-return]


class LitSwiGLU(nn.Module):
    """Gate and values in two matrices."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.values = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.down(F.silu(self.gate(x)) * self.values(x))  # type: ignore[no-any-return]


class LitBlock(nn.Module):
    """Pre-norm residual block with rotary attention, grouped where there are fewer key and value heads."""

    def __init__(self, sizes: GPT2Model | LlamaModel) -> None:
        super().__init__()
        width, is_gpt2 = sizes.d_model, isinstance(sizes, GPT2Model)
        self.d_head = width // sizes.n_head
        self.n_kv_head = sizes.n_head if isinstance(sizes, GPT2Model) else sizes.n_kv_head
        self.widths = [width, self.n_kv_head * self.d_head, self.n_kv_head * self.d_head]
        self.grouped = self.n_kv_head != sizes.n_head
        self.qkv = nn.Linear(width, sum(self.widths), bias=is_gpt2)
        self.attended = nn.Linear(width, width, bias=is_gpt2)
        self.norms = nn.ModuleList(_norm(sizes) for _ in range(2))
        self.feed_forward: nn.Module = (
            LitGELU(width, 4 * width) if isinstance(sizes, GPT2Model) else LitSwiGLU(width, sizes.d_ff)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, C), and (T, D) tables -> (B, T, C)."""
        q, k, v = (
            part.view(*part.shape[:2], -1, self.d_head).transpose(1, 2)  # (B, H, T, D)
            for part in torch.split(self.qkv(self.norms[0](x)), self.widths, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(
            _turn(q, cos, sin), _turn(k, cos, sin), v, is_causal=True, enable_gqa=self.grouped
        )
        x = x + self.attended(mixed.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norms[1](x))  # type: ignore[no-any-return]


class LitModel(nn.Module):
    """Embedding, blocks, final norm, head."""

    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: GPT2Model | LlamaModel) -> None:
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocab_size, sizes.d_model)
        self.blocks = nn.ModuleList(LitBlock(sizes) for _ in range(sizes.n_layer))
        self.norm = _norm(sizes)
        self.head = nn.Linear(sizes.d_model, sizes.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        if isinstance(sizes, GPT2Model) or sizes.tied_head:
            self.tokens.weight = self.head.weight
        d_head = sizes.d_model // sizes.n_head
        base = 10_000.0 if isinstance(sizes, GPT2Model) else sizes.rope_theta
        frequencies = base ** -(torch.arange(0, d_head, 2).float() / d_head)
        angles = torch.outer(torch.arange(sizes.max_seq_len).float(), frequencies).repeat(1, 2)  # (T, D)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, T) -> (B, T, V)."""
        T = inputs.shape[1]
        x = self.tokens(inputs)
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class LitLoop:
    """Autocast, chunked loss, accumulate, clip, step; the loss at every step."""

    def __init__(self, config: TrainingRun, device: str) -> None:
        torch.manual_seed(config.run.seed)
        self._device = device
        self._autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=config.train.dtype == "bf16")
        model = LitModel(config.model).to(device)
        self._parameters = list(model.parameters())
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=config.optim.lr,
            betas=config.optim.betas,
            weight_decay=config.optim.weight_decay,
            fused=device == "cuda",
        )
        self._model = torch.compile(model) if config.train.compile else model

    def step(self, windows: Sequence[Tensor]) -> float:
        """As `Loop.step`."""
        losses = []
        for each in windows:
            inputs, targets = inputs_and_targets(each, self._device)
            with self._autocast:
                logits = self._model(inputs)
            loss = chunked_loss(logits.float(), targets)
            (loss / len(windows)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self._parameters, _CLIP, error_if_nonfinite=True)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(torch.stack(losses).mean())


def chunked_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, T, V), (B, T) -> the mean over the targets that count, nats, taken 128 tokens at a time."""
    flat = targets.reshape(-1)
    pairs = zip(torch.split(logits.flatten(0, 1), _CHUNK), torch.split(flat, _CHUNK), strict=True)
    parts = [F.cross_entropy(*pair, ignore_index=_IGNORED, reduction="none") for pair in pairs]
    return torch.cat(parts).sum() / (flat != _IGNORED).sum().clamp(min=1)


def _norm(sizes: GPT2Model | LlamaModel) -> nn.Module:
    is_gpt2 = isinstance(sizes, GPT2Model)
    return nn.LayerNorm(sizes.d_model, sizes.norm_eps) if is_gpt2 else LitRMSNorm(sizes.d_model, sizes.norm_eps)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, H, T, D) turned by the angles of its positions, computed in fp32."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
