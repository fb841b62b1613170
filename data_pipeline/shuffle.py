"""Order and split of documents: pure functions of (seed, document).

No worker, shard boundary or earlier run changes them. Documents are packed in the sorted order of a keyed hash of their
ids. A document is validation or test by a keyed hash of its normalised text, so copies of a text can never lie on two
sides.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "val", "test")

UInt64Array = NDArray[np.uint64]

_ORDER_SALT, _SPLIT_SALT = 0x6F72646572, 0x73706C6974


def mix64(values: UInt64Array) -> UInt64Array:
    """The finaliser of splitmix64, a bijection on 64-bit numbers. Source: Steele, Lea, Flood 2014, figure 16."""
    mixed = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def unit_interval(keys: UInt64Array) -> NDArray[np.float64]:
    """The upper 53 bits as a fraction of 1, exactly: 0 <= x < 1."""
    return (keys >> np.uint64(11)).astype(np.float64) / (1 << 53)


def order_keys(doc_ids: NDArray[np.int64], seed: int) -> UInt64Array:
    """What documents are sorted by, then by id: (n,)."""
    return mix64(doc_ids.astype(np.uint64) ^ _salt(seed, _ORDER_SALT))


def split_of(
    hash_high: UInt64Array, hash_low: UInt64Array, seed: int, val_fraction: float, test_fraction: float = 0.0
) -> NDArray[np.int8]:
    """Position in SPLITS of each document's split, by its content hash, (n,).

    Validation is what falls below `val_fraction`, test what follows it: to add a test split, or to enlarge the
    validation split of one without, never moves a document out of validation.
    """
    fraction = unit_interval(mix64(hash_low ^ mix64(hash_high ^ _salt(seed, _SPLIT_SALT))))
    in_val, in_test = fraction < val_fraction, fraction < val_fraction + test_fraction
    return np.select([in_val, in_test], [np.int8(1), np.int8(2)], np.int8(0)).astype(np.int8)


def _salt(seed: int, purpose: int) -> np.uint64:
    # Two's complement, so that every int64 seed is good; seeds beyond are taken modulo 2**64.
    value = np.array([(seed ^ (purpose << 16)) % (1 << 64)], np.uint64)
    return np.uint64(mix64(value)[0])
