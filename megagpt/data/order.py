"""Shuffled order without tables: a keyed bijection of 0 .. n-1 that costs the same at any n and any position.

A balanced Feistel network permutes the square of side ceil(sqrt(n)); results outside 0 .. n-1 are put through
it again until they fall inside (cycle walking), which keeps it a bijection. Fewer than 2 * side numbers of
the square lie outside, so more than one pass is rare. It shuffles; it is not meant to keep secrets.

Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", methods 2 (cycle walking) and 3
(Feistel network modulo a and b).
"""

from __future__ import annotations

import hashlib
import math
import struct

import numpy as np
import numpy.typing as npt

OrderKey = tuple[int, ...]
"""One 64-bit number for each round of the network."""

# As many 64-bit keys as one blake2b digest holds; four rounds already give a pseudo-random permutation.
_ROUNDS = 8
_LARGEST_N = 2**62  # in `permute_array` no sum and no product leaves 64 bits
_MASK = 2**64 - 1
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # Source: splitmix64, Steele, Lea and Flood 2014
_SHIFTS = (30, 27, 31)


def order_key(*parts: int) -> OrderKey:
    """The key of one order, from integers such as (seed, file, epoch); the same on every machine."""
    text = ",".join(str(part) for part in parts).encode()
    return struct.unpack(f"<{_ROUNDS}Q", hashlib.blake2b(text, digest_size=8 * _ROUNDS).digest())


def permute(index: int, n: int, key: OrderKey) -> int:
    """Where `index` of 0 .. n-1 goes in the order that `key` names.

    Raises:
        ValueError: `index` is not in 0 .. n-1, or n is over 2**62.
    """
    if not 0 <= index < n <= _LARGEST_N:
        raise ValueError(f"index {index} must be in 0 .. n-1 with n = {n} of at most 2**62")
    side = _side(n)
    while True:
        left, right = divmod(index, side)
        for round_key in key:
            left, right = right, (left + _mix(right ^ round_key) % side) % side
        index = left * side + right
        if index < n:
            return index


def permute_array(indices: npt.NDArray[np.integer], n: int, key: OrderKey) -> npt.NDArray[np.int64]:
    """`permute` of every element, in a few passes over the array.

    Raises:
        ValueError: an index is not in 0 .. n-1, or n is over 2**62.
    """
    if indices.size and not (indices.min() >= 0 and indices.max() < n <= _LARGEST_N):
        raise ValueError(f"indices must be in 0 .. n-1 with n = {n} of at most 2**62")
    result = indices.astype(np.uint64)
    side = np.uint64(_side(n))
    walking = np.arange(result.size)
    while walking.size:
        left, right = np.divmod(result.flat[walking], side)
        for round_key in key:
            left, right = right, (left + _mix_array(right ^ np.uint64(round_key)) % side) % side
        result.flat[walking] = left * side + right
        walking = walking[result.flat[walking] >= n]
    return result.astype(np.int64)


def _side(n: int) -> int:
    """The smallest side whose square holds 0 .. n-1."""
    return math.isqrt(n - 1) + 1 if n > 0 else 1


def _mix(x: int) -> int:
    """The finaliser of splitmix64: every input bit moves about half of the output bits."""
    x = ((x ^ (x >> _SHIFTS[0])) * _MULTIPLIERS[0]) & _MASK
    x = ((x ^ (x >> _SHIFTS[1])) * _MULTIPLIERS[1]) & _MASK
    return x ^ (x >> _SHIFTS[2])


def _mix_array(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(_SHIFTS[0]))) * np.uint64(_MULTIPLIERS[0])
    x = (x ^ (x >> np.uint64(_SHIFTS[1]))) * np.uint64(_MULTIPLIERS[1])
    return x ^ (x >> np.uint64(_SHIFTS[2]))
