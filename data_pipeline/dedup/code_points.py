"""Reading UTF-8 and hashing characters inside compiled loops.

Arrow vouches for its strings being valid UTF-8, so nothing is checked here.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from megagpt.text.word_hashes import mix

# FNV-1a's start and prime. Source: Fowler, Noll, Vo, draft-eastlake-fnv, section 5.
EMPTY_HASH = 0xCBF29CE484222325
_FNV_PRIME = 0x100000001B3


@numba.njit(cache=True, nogil=True, inline="always")
def code_point_at(data: NDArray[np.uint8], at: int) -> tuple[np.int64, int]:
    """The character that begins at byte `at`, and its number of bytes. Source: RFC 3629, section 3."""
    first = np.int64(data[at])
    if first < 0x80:
        return first, 1
    if first < 0xE0:
        return (first & 0x1F) << 6 | np.int64(data[at + 1] & 0x3F), 2
    if first < 0xF0:
        return (first & 0x0F) << 12 | np.int64(data[at + 1] & 0x3F) << 6 | np.int64(data[at + 2] & 0x3F), 3
    high = (first & 0x07) << 18 | np.int64(data[at + 1] & 0x3F) << 12
    return high | np.int64(data[at + 2] & 0x3F) << 6 | np.int64(data[at + 3] & 0x3F), 4


@numba.njit(cache=True, nogil=True, inline="always")
def add_character(state: np.uint64, code: np.integer[Any]) -> np.uint64:
    """The hash of a string of characters, one more of them taken in: FNV-1a over code points; starts at EMPTY_HASH."""
    return (state ^ np.uint64(code)) * np.uint64(_FNV_PRIME)


@numba.njit(cache=True, nogil=True, inline="always")
def finish_hash(state: np.uint64) -> np.uint64:
    """All 64 bits depend on all of the string: FNV-1a alone leaves its high bits to the first characters."""
    return np.uint64(mix(state))
