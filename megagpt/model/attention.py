"""Implementations of softmax(q k^T / sqrt(D)) v, for whole rows and for rows of documents that do not see each other.

Which one a model takes is chosen once, when it is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from megagpt.errors import ConfigError
from megagpt.model.context import begins

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Side of the squares that FlexAttention computes or skips: its default."""


class Attend(Protocol):
    """One implementation."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, visible: Any, *, dropout: float, grouped: bool) -> Tensor:
        """Attend causally.

        Args:
            q: (B, T, H, D).
            k: (B, T, K, D).
            v: (B, T, K, D).
            visible: what `prepare` made of the micro-batch's document ids; None for whole rows.
            dropout: probability of dropping an attention weight.
            grouped: K is less than H.

        Returns:
            (B, T, H * D).
        """


def whole_sdpa(q: Tensor, k: Tensor, v: Tensor, visible: None, *, dropout: float, grouped: bool) -> Tensor:  # noqa: ARG001
    """PyTorch's own choice: on CUDA in bf16 and fp16 that is its built-in flash-attention kernel."""
    heads_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, H, T, D)
    attended = F.scaled_dot_product_attention(*heads_first, dropout_p=dropout, is_causal=True, enable_gqa=grouped)
    return attended.transpose(1, 2).flatten(2)


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, dropout: float, grouped: bool) -> Tensor:
    """With a mask of T x T bits a row: on every device, in every type, but nothing is skipped."""
    heads_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    attended = F.scaled_dot_product_attention(*heads_first, visible, dropout_p=dropout, enable_gqa=grouped)
    return attended.transpose(1, 2).flatten(2)


def dense_mask(documents: Tensor) -> Tensor:
    """(B, T) ids -> (B, 1, T, T) bool: True where a query (dimension 2) may look."""
    return (documents[:, :, None] == documents[:, None, :]).tril()[:, None]


def flex(q: Tensor, k: Tensor, v: Tensor, visible: BlockMask, *, dropout: float, grouped: bool) -> Tensor:  # noqa: ARG001
    """FlexAttention, compiled: squares of the mask that hold nothing are skipped.

    Source: Dong et al. 2024, section 3.
    """
    heads_first = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    attended = _flex_attention()(*heads_first, block_mask=visible, enable_gqa=grouped)
    return attended.transpose(1, 2).flatten(2)


def block_mask(documents: Tensor) -> BlockMask:
    """Which squares FlexAttention computes, from (B, T) ids that do not fall along a row.

    Left of the diagonal, a square holds something where its last key is of its first query's document, and everything
    where its first key is of its last query's: two ids a block of tokens tell all, and no T x T mask is made
    (`create_block_mask` makes one).
    """
    from torch.nn.attention.flex_attention import BlockMask  # it brings the compiler with it: two seconds

    B, T = documents.shape
    # What is missing in a last block continues its document; such a block is never full, as in `create_block_mask`.
    padded = torch.cat((documents, documents[:, -1:].expand(B, -T % BLOCK)), dim=1)
    blocks = padded.view(B, -1, BLOCK)  # (B, T / BLOCK, BLOCK)
    first, last = blocks[..., 0], blocks[..., -1]
    n = first.shape[1]
    square = torch.arange(n, device=documents.device)
    left = square[:, None] > square[None, :]
    full = (first[:, None, :] == last[:, :, None]) & left & (square < T // BLOCK)[:, None]  # (B, queries, keys)
    touched = (last[:, None, :] == first[:, :, None]) & left | (square[:, None] == square[None, :])

    def may_look(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001 - as they call it
        return (query >= key) & (documents[row, query] == documents[row, key])

    partly = _in_order(touched & ~full)
    return BlockMask.from_kv_blocks(*partly, *_in_order(full), BLOCK, may_look, (T, T))


def _in_order(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n, n) bool -> (B, 1, n) counts and (B, 1, n, n) indices, the chosen ones first: FlexAttention's form."""
    indices = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32)[:, None], indices.int()[:, None]


@cache
def _flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@dataclass(frozen=True, slots=True)
class Stretches:
    """The documents of a micro-batch, its rows laid end to end."""

    bounds: Tensor
    """(documents + 1,) int32: where each begins among the B * T tokens, and the end."""
    longest: int
    """Tokens."""


def stretches(documents: Tensor) -> Stretches:
    """(B, T) ids -> what kernels for sequences of different lengths want. Waits for the device, once a micro-batch."""
    starts = begins(documents).flatten().nonzero()[:, 0]
    bounds = F.pad(starts, (0, 1), value=documents.numel()).int()
    return Stretches(bounds, int(bounds.diff().max()))


def varlen(q: Tensor, k: Tensor, v: Tensor, visible: Stretches, *, dropout: float, grouped: bool) -> Tensor:  # noqa: ARG001
    """PyTorch's built-in flash-attention kernel for sequences of different lengths."""
    from torch.nn.attention.varlen import varlen_attn  # as in `block_mask`

    flat = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    bounds, longest = visible.bounds, visible.longest
    attended = varlen_attn(*flat, bounds, bounds, longest, longest, window_size=(-1, 0), enable_gqa=grouped)
    return attended.flatten(1).unflatten(0, q.shape[:2])  # type: ignore[union-attr]


def whole_flash(q: Tensor, k: Tensor, v: Tensor, visible: None, *, dropout: float, grouped: bool) -> Tensor:  # noqa: ARG001
    """The flash-attn package. Source: Dao 2023, section 3."""
    return _flash_attn().flash_attn_func(q, k, v, dropout_p=dropout, causal=True).flatten(2)


def varlen_flash(q: Tensor, k: Tensor, v: Tensor, visible: Stretches, *, dropout: float, grouped: bool) -> Tensor:  # noqa: ARG001
    """The flash-attn package, sequences of different lengths."""
    flat = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    bounds, longest = visible.bounds, visible.longest
    attended = _flash_attn().flash_attn_varlen_func(
        *flat, bounds, bounds, longest, longest, dropout_p=dropout, causal=True
    )
    return attended.flatten(1).unflatten(0, q.shape[:2])


@cache
def _flash_attn() -> Any:
    """The flash-attn package, or None."""
    try:
        return importlib.import_module("flash_attn")
    except ImportError:
        return None


@dataclass(frozen=True, slots=True)
class Sizes:
    """What decides whether an implementation can be used."""

    device_type: str
    dtype: torch.dtype
    d_head: int
    dropout: float


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute attention, for whole rows, for packed ones, or for both."""

    refuses: Callable[[Sizes], str | None]
    """Why it cannot be used, or None."""
    whole: Attend | None = None
    packed: Attend | None = None
    prepare: Callable[[Tensor], Any] | None = None
    """(B, T) ids -> what `packed` gets as `visible`."""


def _refuses_nothing(sizes: Sizes) -> str | None:  # noqa: ARG001
    return None


def _refuses_flex(sizes: Sizes) -> str | None:
    if sizes.device_type != "cuda":
        return f"FlexAttention of this PyTorch has no backward on {sizes.device_type}"
    return "FlexAttention has no dropout" if sizes.dropout else None


def _refuses_half_kernels(sizes: Sizes) -> str | None:
    if sizes.device_type != "cuda":
        return f"it has no kernel for {sizes.device_type}"
    if sizes.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 and fp16, not in {str(sizes.dtype).removeprefix('torch.')}"
    if sizes.d_head > 256 or sizes.d_head % 8:
        return f"it wants heads of a multiple of 8 and at most 256 channels, not {sizes.d_head}"
    return None


def _refuses_varlen(sizes: Sizes) -> str | None:
    return _refuses_half_kernels(sizes) or ("PyTorch's varlen_attn has no dropout" if sizes.dropout else None)


def _refuses_flash(sizes: Sizes) -> str | None:
    missing = "the flash-attn package is not installed (pip install flash-attn)"
    return _refuses_half_kernels(sizes) or (missing if _flash_attn() is None else None)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "flash": Implementation(_refuses_flash, whole_flash, varlen_flash, stretches),
    "varlen": Implementation(_refuses_varlen, packed=varlen, prepare=stretches),
    "flex": Implementation(_refuses_flex, packed=flex, prepare=block_mask),
    "sdpa": Implementation(_refuses_nothing, whole_sdpa, masked_sdpa, dense_mask),
}
"""`train.attention` -> how. For packed rows `auto` takes the first that can be used: none before the dense mask
computes what no token may see."""


@dataclass(frozen=True, slots=True)
class ChosenAttention:
    """An implementation for the rows of one model."""

    name: str
    attend: Attend
    prepare: Callable[[Tensor], Any] | None = None
    """None for whole rows."""


def choose_attention(name: str, sizes: Sizes, *, packed: bool) -> ChosenAttention:
    """The implementation of that name, or for `auto` the best one that can be used.

    Raises:
        ConfigError: it cannot be used here; says why.
    """
    if name == "auto":
        # For whole rows PyTorch has the same kernel as the package.
        names = list(IMPLEMENTATIONS) if packed else ["sdpa"]
        name = next(each for each in names if IMPLEMENTATIONS[each].refuses(sizes) is None)
    chosen = IMPLEMENTATIONS[name]
    reason = chosen.refuses(sizes)
    if reason is not None:
        raise ConfigError(f"train.attention={name}: {reason}; use train.attention=auto or sdpa")
    attend = chosen.packed if packed else chosen.whole
    if attend is None:
        raise ConfigError(
            f"train.attention={name} is for data.isolate_documents=true alone; use train.attention=auto or sdpa"
        )
    return ChosenAttention(name, attend, chosen.prepare if packed else None)
