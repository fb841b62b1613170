"""Token files for a verification, and the fingerprint of a sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from megagpt.config.schema import TrainingRun
from megagpt.data.indexed import TokenFileWriter, token_dtype

N_DOCUMENTS = 60
LENGTHS = (20, 120)
"""Tokens of the shortest and of the longest document."""


def write_tokens(config: TrainingRun) -> None:
    """Every file of `data.train`: documents in which a token mostly follows from the last, so that the loss falls."""
    train = config.data.train
    prefixes = [train] if isinstance(train, Path) else [part.prefix for part in train]
    for number, prefix in enumerate(prefixes):
        random = np.random.default_rng(number)
        with TokenFileWriter(prefix, token_dtype(config.model.vocab_size)) as writer:
            for _ in range(N_DOCUMENTS + config.model.max_seq_len // LENGTHS[0]):
                writer.add_document(_document(random, config.model.vocab_size))


def _document(random: np.random.Generator, vocab_size: int) -> npt.NDArray[np.int64]:
    tokens = np.zeros(int(random.integers(*LENGTHS)), np.int64)  # the last one stays 0, the end of a document
    token = int(random.integers(vocab_size))
    for place in range(len(tokens) - 1):
        tokens[place] = token
        token = (3 * token + int(random.integers(4))) % vocab_size
    return tokens


def fingerprint(sample: npt.NDArray[np.int64]) -> str:
    """Of the (T + 1,) tokens of a sample."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(sample, np.int64).tobytes())
