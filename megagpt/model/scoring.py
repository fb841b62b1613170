"""What scoring asks of a model: log-probabilities of given tokens at given positions, behind a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from megagpt.model.layers import KVCache
from megagpt.model.packed import Packing

if TYPE_CHECKING:
    from megagpt.model.decoder import DecoderSizes

LOGIT_BYTES = 64 << 20
"""Most memory that the logits of one projection may take, in double precision."""

EXP_BYTES = 1 << 20
"""Memory of exponentials that are summed together on a CPU: they should stay in its cache."""


class ScoringModel(Protocol):
    """A whole model, or one that several processes share and all ask the same things at the same time."""

    sizes: DecoderSizes

    @property
    def device(self) -> torch.device:
        """Where tokens must be."""

    def new_cache(self, n_rows: int, n_slots: int) -> KVCache:
        """An empty cache for `n_rows` sequences of at most `n_slots` tokens."""

    def decode(
        self, tokens: Tensor, cache: KVCache, n_new: Sequence[int], n_wanted: Sequence[int] | None = None
    ) -> Tensor:
        """(B, T) new tokens, `n_new[b]` of row b -> logits (N, V) of what follows the last ones, on every process.

        Of row b the last `n_wanted[b]`, row after row; by default the last one.
        """

    def score(
        self, tokens: Tensor, cache: KVCache, n_new: Sequence[int], wanted: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run new tokens behind those in the cache, and say how probable given tokens are after some of them.

        Args:
            tokens: (B, T) int64; row b holds `n_new[b]` new tokens, then anything.
            cache: from `new_cache`; it is extended.
            n_new: tokens of each row, from 0 to T.
            wanted: (N,) int64, positions in the flattened (B * T) behind which a prediction is asked; N may be 0.
            targets: (N,) int64, the tokens asked for.

        Returns:
            (N,) fp32 log-probabilities in nats, and (N,) bool: the target is the most probable token.
        """


Scorer = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits (n, V) or a share of their columns, rows (N,), targets (N,)) -> as `ScoringModel.score`."""


def score_logits(logits: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The `Scorer` of whole logits. Of equally large ones the first is the most probable.

    fp32 logits are summed in double precision: rounded at the end, the sum does not depend on its order, nor on how a
    vocabulary is cut over processes (but for one value in about 10^8).
    """
    if logits.dtype != torch.float32:
        greedy = logits.argmax(dim=-1)[rows] == targets
        return logits.float().log_softmax(dim=-1)[rows, targets], greedy
    largest, at_target = logits.amax(dim=-1), logits[rows, targets]
    greedy = at_target == largest[rows]
    equal = greedy.nonzero()[:, 0]  # the only ones that need an argmax, which takes a quarter of the time on a CPU
    greedy[equal] = logits[rows[equal]].argmax(dim=-1) == targets[equal]
    n_rows = max(1, EXP_BYTES // (8 * logits.shape[-1])) if logits.device.type == "cpu" else len(logits)
    pieces = zip(torch.split(logits, n_rows), torch.split(largest[:, None], n_rows), strict=True)
    sums = torch.cat([some.double().sub_(most).exp_().sum(dim=-1) for some, most in pieces])
    return (at_target.double() - largest[rows] - sums.log()[rows]).float(), greedy


def score_targets(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    wanted: Tensor,
    targets: Tensor,
    *,
    n_logits: int,
    packing: Packing,
    scorer: Scorer = score_logits,
) -> tuple[Tensor, Tensor]:
    """Project the hidden vectors that are asked about, each once, in pieces of at most `LOGIT_BYTES` of logits.

    Args:
        head: (n, C) -> (n, n_logits).
        hidden: (M, C).
        wanted: (N,) rows of `hidden`.
        targets: (N,) int64.
        n_logits: of the head.
        packing: rows are filled up as packed tokens are.
        scorer: what is made of the logits.

    Returns:
        As `ScoringModel.score`.
    """
    log_probabilities = hidden.new_empty(len(wanted), dtype=torch.float32)
    greedy = torch.empty_like(log_probabilities, dtype=torch.bool)
    rows, index = torch.unique(wanted, return_inverse=True)
    size = max(packing.filled(1), LOGIT_BYTES // (8 * n_logits) // packing.multiple * packing.multiple)
    for start in range(0, len(rows), size):
        logits = head(packing.fill(hidden[rows[start : start + size]]))
        here = ((index >= start) & (index < start + size)).nonzero()[:, 0]
        log_probabilities[here], greedy[here] = scorer(logits, index[here] - start, targets[here])
    return log_probabilities, greedy
