"""tiktoken's ids several times faster, for the splitting of GPT-2 and its kin: what a stage encodes a shard with.

tiktoken spends nearly all of its time in a regular expression that cuts text into pieces, and on merging the same few
pieces over and over. Here a compiled loop cuts, and remembers the tokens of every piece. Letters, numbers and white
space are those of tiktoken's own regular expressions, whichever Unicode version they are of.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import tiktoken
from numpy.typing import NDArray

from data_pipeline import fast_bpe_kernels as kernels
from megagpt.byte_bpe import GPT2_PATTERN, SINGLE_DIGITS_PATTERN, THREE_DIGITS_PATTERN
from megagpt.text.text_classes import N_CODE_POINTS
from megagpt.tokenizer import TokenArray

UInt8Array = NDArray[np.uint8]
Int64Array = NDArray[np.int64]

CACHE_ROWS = 1 << 20
"""Of 32 bytes; with the bytes of long pieces and the tokens of those with more than three, at most 64 MB."""
_CACHE_KEY_BYTES = 16 << 20
_CACHE_TOKENS = 4 << 20
_DIGITS = {GPT2_PATTERN: 0, SINGLE_DIGITS_PATTERN: 1, THREE_DIGITS_PATTERN: 3}
_SURROGATES = range(0xD800, 0xE000)
_LONGEST_TOKEN = 0xFFFF
"""Bytes: the table of the vocabulary has 16 bits for it."""


class FastBpe:
    """What a `tiktoken.Encoding` does to text, whose special tokens' names are ordinary text."""

    def __init__(self, encoding: Any, digits: int, cache_rows: int = CACHE_ROWS) -> None:
        """Use `of` instead, which knows whether there can be one."""
        self._encoding = encoding
        self._splitting = kernels.Splitting(character_classes(), digits)
        self._vocabulary = _vocabulary_table(encoding._mergeable_ranks)
        self._cache = kernels.empty_table(cache_rows, _CACHE_KEY_BYTES, _CACHE_TOKENS)
        self._lock = threading.Lock()  # compiled loops run side by side with those of other threads

    @classmethod
    def of(cls, encoding: Any, cache_rows: int = CACHE_ROWS) -> Self | None:
        """For a `tiktoken.Encoding`; None: there is none, it cuts text in a way not known here, or lacks some byte."""
        if encoding is None:
            return None
        digits = _DIGITS.get(encoding._pat_str)
        ranks = encoding._mergeable_ranks
        if digits is None or not all(bytes([byte]) in ranks for byte in range(256)):
            return None
        return None if max(map(len, ranks)) > _LONGEST_TOKEN else cls(encoding, digits, cache_rows)

    def encode(self, text: UInt8Array, ends: Int64Array, separator: int) -> tuple[TokenArray, Int64Array]:
        """Tokens of all texts in one array, each text followed by the separator, and the length of each.

        Args:
            text: valid UTF-8.
            ends: (n + 1,) where text i begins and ends.
            separator: token after each text.
        """
        n_texts, n_bytes = len(ends) - 1, int(ends[-1] - ends[0])
        tokens = np.empty(n_bytes + n_texts + 2, np.uint32)
        lengths = np.empty(n_texts, np.int64)
        text = text.view()
        text.flags.writeable = False  # arrays that may be written to are another type, to be compiled for
        left_out = np.empty((n_bytes // kernels.LONGEST_MERGED + 1, 4), np.int64)
        output = (tokens, lengths, left_out)
        with self._lock:
            n_tokens, n_left_out = kernels.encode_texts(
                text, ends, self._splitting, self._vocabulary, self._cache, np.uint32(separator), output
            )
        return self._put_in(text, tokens[:n_tokens], lengths, left_out[:n_left_out]), lengths

    def _put_in(self, text: UInt8Array, tokens: TokenArray, lengths: Int64Array, left_out: Int64Array) -> TokenArray:
        """The tokens of pieces that are too long for the compiled loop, by tiktoken."""
        if not len(left_out):
            return tokens
        parts, done = [], 0
        for document, place, begin, end in left_out.tolist():
            piece = self._encoding._core_bpe.encode_single_piece(text[begin:end].tobytes())
            parts += [tokens[done:place], np.array(piece, np.uint32)]
            lengths[document] += len(piece)
            done = place
        return np.concatenate([*parts, tokens[done:]])


@functools.cache
def character_classes() -> UInt8Array:
    """Class of each code point for tiktoken's regular expressions; (0x110000,), read only.

    Surrogates, which are no characters, are of the class OTHER.
    """
    codes = np.delete(np.arange(N_CODE_POINTS, dtype="<u4"), _SURROGATES)
    characters = codes.tobytes().decode("utf-32-le")
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    classes = np.full(N_CODE_POINTS, kernels.OTHER, np.uint8)
    for kind, pattern in ((kernels.LETTER, r"\p{L}"), (kernels.NUMBER, r"\p{N}"), (kernels.SPACE, r"\s")):
        # What a pattern does not match tiktoken passes over: only the characters of the class come out.
        probe = tiktoken.Encoding("probe", pat_str=pattern, mergeable_ranks=single_bytes, special_tokens={})
        found = bytes(probe.encode_ordinary(characters)).decode()
        classes[np.frombuffer(found.encode("utf-32-le"), "<u4")] = kind
    classes.flags.writeable = False
    return classes


def _vocabulary_table(ranks: Mapping[bytes, int]) -> Any:
    lengths = np.fromiter(map(len, ranks), np.int64, len(ranks))
    ids = np.fromiter(ranks.values(), np.uint32, len(ranks))
    ends = np.concatenate([[0], np.cumsum(lengths)])
    table = kernels.empty_table(4 * len(ranks), int(ends[-1]), 0)
    kernels.fill_vocabulary(np.frombuffer(b"".join(ranks), np.uint8), ends, ids, table)
    return table
