"""What a layer must know of a micro-batch beside the vectors: where each token stands and what it may look at.

It is made once a micro-batch and handed to every layer that asks, also to those that run again in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor


class Context(Protocol):
    """For a layer that holds the positions `here` of each row."""

    @property
    def visible(self) -> Any:
        """What the chosen attention made of the documents (`megagpt.model.attention`); None where rows are whole."""

    def positions(self, here: slice, device: torch.device) -> Tensor:
        """(T,) or (B, T) int64: the positions of a row's tokens, for learned positions."""

    def rows(self, table: Tensor, here: slice) -> Tensor:
        """Rows of a table with one row a position: (T, ...) or (B, T, ...)."""


class WholeRows:
    """Every row is one text: token t stands at position t and looks at all before it."""

    visible = None

    def positions(self, here: slice, device: torch.device) -> Tensor:
        """(T,) int64."""
        return torch.arange(here.start, here.stop, device=device)

    def rows(self, table: Tensor, here: slice) -> Tensor:
        """(T, ...), a view."""
        return table[here]


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows of several documents that do not see each other; positions count from 0 in each."""

    within: Tensor
    """(B, T) int64: the position of each token in its document."""
    visible: Any
    """As `Context.visible`."""

    def positions(self, here: slice, device: torch.device) -> Tensor:  # noqa: ARG002 - they are there
        """(B, T) int64."""
        return self.within[:, here]

    def rows(self, table: Tensor, here: slice) -> Tensor:
        """(B, T, ...)."""
        return table[self.within[:, here]]


WHOLE_ROWS = WholeRows()

Contexts = Callable[[Tensor | None], Context]
"""(B, T) document ids, or None -> the context of a micro-batch."""


def whole_rows(documents: Tensor | None) -> Context:
    """The `Contexts` of a model whose rows are whole.

    Raises:
        ValueError: there are documents, which this model would not tell apart.
    """
    if documents is not None:
        raise ValueError("this model does not tell documents apart: call use_attention(model, ...) with one that does")
    return WHOLE_ROWS


def packed_rows(prepare: Callable[[Tensor], Any]) -> Contexts:
    """The `Contexts` of a model that keeps documents apart; `prepare` makes `visible` of their ids."""
    return partial(_pack, prepare=prepare)


def _pack(documents: Tensor | None, prepare: Callable[[Tensor], Any]) -> Context:
    if documents is None:
        raise ValueError("this model keeps documents apart and was not told them: model(tokens, documents)")
    return PackedRows(positions_within(documents), prepare(documents))


def begins(documents: Tensor) -> Tensor:
    """(B, T) document ids -> (B, T) bool: the token is the first of its document in its row."""
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return first


def positions_within(documents: Tensor) -> Tensor:
    """(B, T) document ids -> (B, T) int64 positions, counted from 0 in each document of a row."""
    here = torch.arange(documents.shape[1], device=documents.device).expand(documents.shape)
    return here - (here * begins(documents)).cummax(dim=1).values
