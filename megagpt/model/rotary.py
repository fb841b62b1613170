"""Rotary positions: pairs of channels are turned by an angle that grows with the position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megagpt.model.context import WHOLE_ROWS, Context


class Rotary(nn.Module):
    """Tables of cosines and sines, and the turn itself; one object serves all blocks of a model.

    Half-split layout: channel i is paired with channel i + D/2 (as in Hugging Face Llama; Meta's own weights pair
    2i with 2i + 1, so their q and k rows are permuted when they are brought over). The tables follow the module's
    type: in bf16 they are rounded once, after having been computed in fp32.

    Source: Su et al. 2021, section 3.4.2; frequencies theta^(-2i/D).
    """

    cos: Tensor
    sin: Tensor
    stretch: int = 0
    """Which stretch of its sequences `forward` gets: with T vectors, they begin at position stretch * T."""

    def __init__(self, d_head: int, max_seq_len: int, theta: float) -> None:
        super().__init__()
        self.d_head = d_head
        self.theta = theta
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(max_seq_len, 1, d_head // 2), persistent=False)
        self.reset()

    def reset(self) -> None:
        """Fill the tables, wherever they are. They are not saved, and `to_empty` leaves them undefined."""
        device = self.cos.device
        channels = torch.arange(0, self.d_head, 2, dtype=torch.float32, device=device)
        frequencies = 1.0 / (self.theta ** (channels / self.d_head))
        positions = torch.arange(len(self.cos), dtype=torch.float32, device=device)
        angles = (positions[:, None] * frequencies)[:, None]  # (S, 1, D/2)
        with torch.no_grad():
            self.cos.copy_(angles.cos())
            self.sin.copy_(angles.sin())

    def forward(self, x: Tensor, *, context: Context = WHOLE_ROWS) -> Tensor:
        """(B, T, H, D) at the context's positions of its stretch -> the same shape, turned."""
        T = x.shape[1]
        here = slice(self.stretch * T, (self.stretch + 1) * T)
        return _turn(x, context.rows(self.cos, here), context.rows(self.sin, here))

    def at(self, x: Tensor, positions: Tensor) -> Tensor:
        """(B, T, H, D) at (B, T) positions -> the same shape, turned."""
        return _turn(x, self.cos[positions], self.sin[positions])


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
