"""A loop equivalent to nanoGPT's, written from its documentation; none of its code.

As documented (README, config/train_gpt2.py and the defaults of its train.py): GPT-2's shape without biases, learned
positions, tied head, exact GELU, PyTorch's fused attention; fp32 weights under bf16 autocast, matrices alone decay,
AdamW (fused on a GPU), gradients clipped at 1.0 and set to None; no wait for the device at each step. Where
`train.compile` is true the whole model is compiled, as its default on a GPU. Not as documented: on a CPU it turns
autocast off, which is slower where the CPU multiplies in bf16; here it stays on. The vocabulary is the configuration's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megagpt.bench.loop import inputs_and_targets
from megagpt.config.schema import GPT2Model, TrainingRun

_CLIP = 1.0


class NanoBlock(nn.Module):
    """Pre-norm attention and feed-forward; neither norms nor linear maps have a bias."""

    def __init__(self, width: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.first_norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attended = nn.Linear(width, width, bias=False)
        self.second_norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
            for part in self.qkv(self.first_norm(x)).split(C, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attended(mixed.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.down(F.gelu(self.up(self.second_norm(x))))  # type: ignore[no-any-return]


class NanoModel(nn.Module):
    """Embeddings, blocks, final norm, tied head, and the mean loss."""

    def __init__(self, sizes: GPT2Model) -> None:
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocab_size, sizes.d_model)
        self.positions = nn.Embedding(sizes.max_seq_len, sizes.d_model)
        self.blocks = nn.ModuleList(NanoBlock(sizes.d_model, sizes.n_head) for _ in range(sizes.n_layer))
        self.norm = nn.LayerNorm(sizes.d_model, bias=False)
        self.head = nn.Linear(sizes.d_model, sizes.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            ends_branch = name.endswith(("attended.weight", "down.weight"))
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * sizes.n_layer) if ends_branch else 0.02)
        self.tokens.weight = self.head.weight

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """(B, T), (B, T) -> the mean negative log-likelihood, nats."""
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1], device=inputs.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-1)


class NanoLoop:
    """Autocast, accumulate, clip, step, forget the gradients."""

    def __init__(self, config: TrainingRun, device: str) -> None:
        assert isinstance(config.model, GPT2Model)  # noqa: S101 - `check_comparable`
        torch.manual_seed(config.run.seed)
        self._device = device
        self._autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=config.train.dtype == "bf16")
        model = NanoModel(config.model).to(device)
        self._parameters = list(model.parameters())
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self._parameters if p.dim() >= 2], "weight_decay": config.optim.weight_decay},
                {"params": [p for p in self._parameters if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=config.optim.lr,
            betas=config.optim.betas,
            fused=device == "cuda",
        )
        self._model = torch.compile(model) if config.train.compile else model

    def step(self, windows: Sequence[Tensor]) -> Tensor:
        """As `Loop.step`."""
        loss = torch.zeros(())
        for each in windows:
            with self._autocast:
                loss = self._model(*inputs_and_targets(each, self._device)) / len(windows)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, _CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach() * len(windows)  # of the last micro-batch, as it logs
