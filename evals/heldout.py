"""Held-out loss of a decoder on a token file: nats a token and bits a byte, comparable across tokenizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evals.sharing import Sharing
from megagpt.data.indexed import TokenFile
from megagpt.data.manifest import read_manifest
from megagpt.errors import EvalError
from megagpt.model.scoring import ScoringModel


@dataclass(frozen=True, slots=True)
class HeldoutLoss:
    """Loss over windows of a token file; standard errors are over windows."""

    n_windows: int
    n_windows_total: int
    n_tokens: int
    """Tokens predicted."""
    nats_per_token: float
    nats_per_token_stderr: float
    bytes_per_token: float | None
    """Of the whole file; None where no manifest.json counts its text."""

    @property
    def bits_per_byte(self) -> float | None:
        """Nats / token / ln 2 / (bytes / token)."""
        return self._per_byte(self.nats_per_token)

    @property
    def bits_per_byte_stderr(self) -> float | None:
        """Likewise; the file's bytes per token are taken as exact."""
        return self._per_byte(self.nats_per_token_stderr)

    def _per_byte(self, nats: float) -> float | None:
        return None if self.bytes_per_token is None else nats / math.log(2) / self.bytes_per_token


def heldout_loss(
    model: ScoringModel,
    prefix: Path,
    *,
    max_seq_len: int,
    n_windows: int | None = None,
    batch_size: int = 16,
    on_windows: Callable[[int, int], None] | None = None,
    sharing: Sharing | None = None,
) -> HeldoutLoss:
    """Score the stream of tokens in windows that do not overlap; each token but the very first is predicted once.

    Windows run over the borders of documents, as in training, so end-of-text tokens are predicted too and their nats
    count; the bytes are those of the text alone. This makes bits per byte an upper bound for the text.

    Args:
        model: in evaluation mode, on its device.
        prefix: a .bin/.idx pair; manifest.json beside it gives the bytes.
        max_seq_len: targets of one window, in tokens; the last window may be shorter.
        n_windows: only the first ones; None for all.
        batch_size: windows a forward pass.
        on_windows: told how many windows are scored, and of how many.
        sharing: this process's part of the work; None where it is alone.

    Raises:
        DataError: the pair is missing or damaged.
        EvalError: it holds fewer than two tokens, or tokens that the model has not.
    """
    tokens = TokenFile.open(prefix)
    if tokens.n_tokens < 2:
        raise EvalError(f"{prefix}: {tokens.n_tokens} tokens; at least 2 are needed to predict one from the other")
    total = math.ceil((tokens.n_tokens - 1) / max_seq_len)
    chosen = total if n_windows is None else min(n_windows, total)
    if chosen < 1:
        raise EvalError(f"{n_windows} windows of {prefix} were asked for; must be 1 or more")
    sums, counts = [], []
    batches = [range(first, min(first + batch_size, chosen)) for first in range(0, chosen, batch_size)]

    def score(batch: range) -> list[tuple[float, int]]:
        return _score_batch(model, tokens, batch, max_seq_len)

    for number, found in (sharing or Sharing()).map(batches, score):
        for window_sum, count in found:
            sums.append(window_sum)
            counts.append(count)
        if on_windows is not None:
            on_windows(batches[number].stop, chosen)
    nats, stderr = _ratio(np.array(sums), np.array(counts, dtype=np.float64))
    return HeldoutLoss(chosen, total, sum(counts), nats, stderr, _bytes_per_token(prefix, tokens))


@torch.inference_mode()
def _score_batch(model: ScoringModel, tokens: TokenFile, batch: range, length: int) -> list[tuple[float, int]]:
    """(sum of nats, tokens) of each window."""
    windows = []
    for index in batch:
        start = index * length
        windows.append(tokens.window(start, min(length + 1, tokens.n_tokens - start)).astype(np.int64))
    counts = [window.size - 1 for window in windows]
    inputs = np.zeros((len(windows), max(counts)), dtype=np.int64)
    for row, window in enumerate(windows):
        inputs[row, : counts[row]] = window[:-1]
    targets = np.concatenate([window[1:] for window in windows])
    largest = max(inputs.max(), targets.max())
    if largest >= model.sizes.vocab_size:
        raise EvalError(
            f"{tokens.prefix}: holds token {largest}, but the model knows 0 to {model.sizes.vocab_size - 1}; "
            "were the tokens made with another tokenizer?"
        )
    wanted = np.concatenate([row * inputs.shape[1] + np.arange(n) for row, n in enumerate(counts)])
    block, wanted_, targets_ = (torch.from_numpy(each).to(model.device) for each in (inputs, wanted, targets))
    scores, _ = model.score(block, model.new_cache(*inputs.shape), counts, wanted_, targets_)
    return [(-float(part.double().sum()), n) for part, n in zip(torch.split(scores, counts), counts, strict=True)]


def _ratio(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Ratio of sums and its standard error.

    Source: Cochran, Sampling Techniques, 3rd edition, section 6.4 (linearised variance of a ratio), windows as units.
    """
    mean = float(sums.sum() / counts.sum())
    n = sums.size
    if n < 2:
        return mean, math.nan
    residuals = sums - mean * counts
    return mean, float(np.sqrt((residuals**2).sum() * n / (n - 1)) / counts.sum())


def _bytes_per_token(prefix: Path, tokens: TokenFile) -> float | None:
    manifest = read_manifest(prefix)
    entry = manifest.files.get(prefix.name) if manifest is not None else None
    return entry.text_bytes / tokens.n_tokens if entry is not None and entry.text_bytes else None
