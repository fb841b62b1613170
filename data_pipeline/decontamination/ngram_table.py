"""n-grams and the items that have them, brought into sorted arrays on disk, in bounded memory.

hashes.npy         (n,) uint64, rising: one hash for each different n-gram of any length in use
offsets.npy        (n + 1,) int64: the items of the i-th n-gram are item_numbers[offsets[i]:offsets[i + 1]]
item_numbers.npy   int32, rising within an n-gram
bloom.npy          (2^k / 8,) uint8: two bits for each n-gram, 16 to 32 bits a n-gram
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megagpt.text.ngrams import MAX_ITEMS, bloom_bytes, set_bloom_bits
from megagpt.text.word_hashes import UInt64Array

HASHES_FILE, OFFSETS_FILE, NUMBERS_FILE, BLOOM_FILE = "hashes.npy", "offsets.npy", "item_numbers.npy", "bloom.npy"

_PARTITION_BITS = 5
"""Partitions are sorted one at a time: at 40 bytes an n-gram, 32 of them hold 800 million in 1 GB."""
_CHUNK = 1 << 20
_PAIR = np.dtype([("hash", "<u8"), ("item", "<i4")])


class NgramTable:
    """Collects the n-grams of items, number by number; `write` makes the files of them."""

    def __init__(self, spool: Path, most_pending: int = 1 << 21) -> None:
        """Begin a table.

        Args:
            spool: empty folder for what does not stay in memory.
            most_pending: n-grams that do.
        """
        self._spool = spool
        self._most_pending = most_pending
        self._pending: list[tuple[UInt64Array, int]] = []
        self._n_pending = 0

    def add(self, hashes: UInt64Array, item: int) -> None:
        """Add the different n-grams of one item."""
        self._pending.append((hashes, item))
        self._n_pending += len(hashes)
        if self._n_pending >= self._most_pending:
            self._flush()

    def write(self, folder: Path, task_of_item: NDArray[np.int32]) -> tuple[NDArray[np.int32], int, int]:
        """Write the four files.

        Args:
            folder: where to.
            task_of_item: (items,) the number of each item's task.

        Returns:
            how many n-grams each item is left with, (items,); the number of different n-grams written; and of those
            left out because many items share them.
        """
        self._flush()
        kept = np.zeros(len(task_of_item), np.int32)
        n_ngrams = n_pairs = n_shared = 0
        with (
            (self._spool / HASHES_FILE).open("wb") as hashes_file,
            (self._spool / OFFSETS_FILE).open("wb") as offsets_file,
            (self._spool / NUMBERS_FILE).open("wb") as numbers_file,
        ):
            np.zeros(1, np.int64).tofile(offsets_file)
            for partition in range(1 << _PARTITION_BITS):
                hashes, numbers, shared = self._read(partition, task_of_item)
                kept += np.bincount(numbers, minlength=len(kept)).astype(np.int32)
                unique, starts = np.unique(hashes, return_index=True)
                unique.tofile(hashes_file)
                (np.append(starts[1:], len(hashes))[: len(unique)] + n_pairs).astype(np.int64).tofile(offsets_file)
                numbers.tofile(numbers_file)
                n_ngrams, n_pairs, n_shared = n_ngrams + len(unique), n_pairs + len(numbers), n_shared + shared
        for name, kind, length in (
            (HASHES_FILE, "<u8", n_ngrams),
            (OFFSETS_FILE, "<i8", n_ngrams + 1),
            (NUMBERS_FILE, "<i4", n_pairs),
        ):
            _add_header(self._spool / name, folder / name, kind, length)
        _write_bloom(folder, n_ngrams)
        return kept, n_ngrams, n_shared

    def _flush(self) -> None:
        pairs = np.empty(self._n_pending, _PAIR)
        if self._pending:
            pairs["hash"] = np.concatenate([hashes for hashes, _ in self._pending])
            pairs["item"] = np.repeat([item for _, item in self._pending], [len(hashes) for hashes, _ in self._pending])
        partitions = pairs["hash"] >> np.uint64(64 - _PARTITION_BITS)
        for partition in np.unique(partitions).tolist():
            with self._path(partition).open("ab") as file:
                pairs[partitions == partition].tofile(file)
        self._pending, self._n_pending = [], 0

    def _path(self, partition: int) -> Path:
        return self._spool / f"{partition:02d}.pairs"

    def _read(self, partition: int, task_of_item: NDArray[np.int32]) -> tuple[UInt64Array, NDArray[np.int32], int]:
        """The pairs of a partition by hash and item, without n-grams that many items share; how many these are."""
        path = self._path(partition)
        pairs = np.fromfile(path, _PAIR) if path.exists() else np.empty(0, _PAIR)
        hashes, numbers = np.ascontiguousarray(pairs["hash"]), np.ascontiguousarray(pairs["item"])
        task = task_of_item[numbers]
        order = np.lexsort((task, hashes))
        by_hash, by_task = hashes[order], task[order]
        begins = np.ones(len(pairs), bool)
        begins[1:] = (by_hash[1:] != by_hash[:-1]) | (by_task[1:] != by_task[:-1])
        starts = np.flatnonzero(begins)
        sizes = np.diff(np.append(starts, len(pairs)))
        shared = np.unique(by_hash[starts[sizes > MAX_ITEMS]])
        order = np.lexsort((numbers, hashes))
        order = order[~np.isin(hashes[order], shared)]
        return hashes[order], numbers[order], len(shared)


def _add_header(raw: Path, path: Path, kind: str, length: int) -> None:
    """Raw numbers -> a .npy file."""
    with raw.open("rb") as source, path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": (length,)})
        shutil.copyfileobj(source, file, _CHUNK)


def _write_bloom(folder: Path, n_ngrams: int) -> None:
    hashes = np.load(folder / HASHES_FILE, mmap_mode="r")
    shape = (bloom_bytes(n_ngrams),)
    bloom = np.lib.format.open_memmap(folder / BLOOM_FILE, mode="w+", dtype=np.uint8, shape=shape)
    for start in range(0, n_ngrams, _CHUNK):
        set_bloom_bits(bloom, np.asarray(hashes[start : start + _CHUNK]))
    bloom.flush()
