"""Scores that are the same bit for bit whatever is batched with what: switched on, and checked on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from megagpt.generate import Model
from megagpt.model.layers import KVCache
from megagpt.model.packed import FAST, row_invariant

LENGTHS = (1, 3, 40, 150, 600)
"""Tokens of the rows that are compared: below and above one chain and one block of keys."""


def make_batch_invariant(model: Model) -> bool:
    """Switch a model to row-invariant arithmetic, if that holds here.

    A few random rows are scored together, and each by itself, in two parts and at its end alone; the scores must be
    equal bit for bit. Where they are not (another library of matrix products, a GPU), the model is left as fast as it
    was.

    Args:
        model: in fp32; on its device.

    Returns:
        Whether the model is switched.
    """
    model.packing = row_invariant(model.sizes.d_model, torch.get_num_threads())
    rows = _random_rows(model)
    with torch.inference_mode():
        together = _score_together(model, rows)
        single = torch.cat([_score_in_two(model, row) for row in rows])
        ends = _score_together(model, rows, n_scored=1)
    last = torch.tensor([len(row) - 1 for row in rows], device=model.device).cumsum(0) - 1
    if torch.equal(together, single) and torch.equal(together[last], ends):
        return True
    model.packing = FAST
    return False


def bits_of(model: Model) -> str:
    """Hash of the bits that a model with row-invariant arithmetic gives for random rows, and of the number of threads.

    Layouts, machines or libraries that sum in another order give other bits: one of several hundred numbers differs.

    Args:
        model: switched by `make_batch_invariant`.
    """
    with torch.inference_mode():
        scores = _score_together(model, _random_rows(model))
    content = scores.cpu().numpy().tobytes() + torch.get_num_threads().to_bytes(4, "little")
    return hashlib.sha256(content).hexdigest()


def _random_rows(model: Model) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, model.sizes.max_seq_len - 1) for length in LENGTHS]
    return [torch.randint(model.sizes.vocab_size, (n + 1,), generator=generator).tolist() for n in lengths]


def _score_together(model: Model, rows: Sequence[Sequence[int]], n_scored: int | None = None) -> torch.Tensor:
    return _score(model, rows, model.new_cache(len(rows), max(len(row) - 1 for row in rows)), n_scored)


def _score_in_two(model: Model, row: Sequence[int]) -> torch.Tensor:
    n = len(row) - 1
    cut = min(n - 1, n // 3 | 1)  # odd: a library may take rows of a product in pairs (MKL does for heads of 6 or 10)
    cache = model.new_cache(1, max(1, cut))
    first = _score(model, [row[: cut + 1]], cache) if cut else torch.empty(0, device=model.device)
    return torch.cat((first, _score(model, [row[cut:]], cache.expanded([0], n) if cut else model.new_cache(1, n))))


def _score(model: Model, rows: Sequence[Sequence[int]], cache: KVCache, n_scored: int | None = None) -> torch.Tensor:
    """Log-probability of the last tokens of each row, by default of all but the first; row after row."""
    lengths = [len(row) - 1 for row in rows]
    width = max(lengths)
    tokens = torch.tensor([[*row[:-1], *[0] * (width - n)] for row, n in zip(rows, lengths, strict=True)])
    firsts = [0 if n_scored is None else n - n_scored for n in lengths]
    wanted = [
        row * width + i for row, (first, n) in enumerate(zip(firsts, lengths, strict=True)) for i in range(first, n)
    ]
    targets = [token for row, first in zip(rows, firsts, strict=True) for token in row[first + 1 :]]
    device = model.device
    found, _ = model.score(
        tokens.to(device),
        cache,
        lengths,
        torch.tensor(wanted, device=device),
        torch.tensor(targets, device=device),
    )
    return found
