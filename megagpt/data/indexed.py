r"""Token files in Megatron's format: PREFIX.bin holds all tokens, PREFIX.idx says where documents lie.

PREFIX.idx, little-endian, without padding:

    9 bytes  magic  b"MMIDIDX\0\0"
    u64      version, 1
    u8       code of the tokens' type (`DTYPE_OF_CODE`)
    u64      n, number of sequences
    u64      m, number of document indices = documents + 1
    n * i32  tokens in each sequence
    n * i64  byte in PREFIX.bin at which each sequence begins
    m * i64  first sequence of each document; the last one is n

Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py. What `TokenFileWriter` writes has one sequence
a document; files with several are read as well.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from megagpt.atomic import flush_folder, flush_to_disk, publish, temporary_name
from megagpt.errors import DataError, unread

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_OF_CODE: dict[int, np.dtype[np.integer]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
"""Megatron's codes; 6 and 7 are floating point and hold no tokens."""

_CODE_OF_DTYPE: dict[np.dtype[Any], int] = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
_HEADER = struct.Struct("<9sQBQQ")
_UINT16_VOCABULARY = 65500  # Megatron's own limit, below 2**16. Source: DType.optimal_dtype in the file named above
_LONGEST_SEQUENCE = 2**31 - 1  # lengths are int32
_CHUNK = 1 << 20  # sequences checked or written at a time
_BUFFER_BYTES = 1 << 17  # of each file that is being written; per-source packing keeps many open

Tokens = npt.NDArray[np.integer]


def bin_path(prefix: Path) -> Path:
    """The tokens of the pair."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """The index of the pair."""
    return prefix.with_name(prefix.name + ".idx")


def token_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """The type that Megatron chooses, and reads, for a vocabulary: uint16 below 65,500 tokens, else int32."""
    if not 0 < vocab_size <= 2**31:
        raise DataError(f"vocabulary of {vocab_size} tokens: must be between 1 and 2**31 to be stored as int32")
    return np.dtype("<u2") if vocab_size < _UINT16_VOCABULARY else np.dtype("<i4")


class TokenFileWriter:
    """Writes a pair, document by document or in blocks of them; a context manager.

    The pair gets its name when the block ends without an exception, the index last: it is what makes the pair
    valid. An older pair of the same name is replaced. Memory does not grow with the number of documents: their
    lengths go to the unfinished index at once, where the rest of it is made from them.
    """

    def __init__(self, prefix: Path, dtype: npt.DTypeLike) -> None:
        self.prefix = prefix
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.n_tokens = 0
        self.n_documents = 0
        self.max_token_id = -1
        """Largest id so far; -1 before the first token."""
        self._bin: BinaryIO | None = None
        self._idx: BinaryIO | None = None
        if self.dtype not in _CODE_OF_DTYPE:
            known = ", ".join(known.name for known in _CODE_OF_DTYPE)
            raise DataError(f"{prefix}: tokens cannot be stored as {self.dtype.name}; the format knows {known}")

    def __enter__(self) -> Self:
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = temporary_name(bin_path(self.prefix)).open("wb", buffering=_BUFFER_BYTES)
        self._idx = temporary_name(idx_path(self.prefix)).open("wb+", buffering=_BUFFER_BYTES)
        self._idx.write(bytes(_HEADER.size))  # its numbers are known at the end
        return self

    def add_document(self, tokens: Sequence[int] | Tokens) -> None:
        """Append one document.

        Raises:
            DataError: an id is not an integer or does not fit the type of the file.
        """
        found = np.asarray(tokens)
        self.add_documents(found, np.array([found.size]))

    def add_documents(self, tokens: Tokens, lengths: npt.NDArray[np.integer]) -> None:
        """Append documents that follow each other in one array.

        Args:
            tokens: of all of them, (n_tokens,).
            lengths: tokens in each, (n_documents,); they add up to n_tokens.

        Raises:
            DataError: an id is not an integer or does not fit the type of the file; a document is too long.
        """
        if self._bin is None or self._idx is None:
            raise ValueError("a document belongs inside `with TokenFileWriter(...) as writer:`")
        if int(lengths.sum()) != tokens.size:
            raise ValueError(f"lengths add up to {int(lengths.sum())}, but there are {tokens.size} tokens")
        if tokens.size:
            self._check(tokens, lengths)
            self._bin.write(np.ascontiguousarray(tokens, self.dtype).data)
        self._idx.write(lengths.astype("<i4").data)
        self.n_tokens += tokens.size
        self.n_documents += len(lengths)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        temporaries = [temporary_name(path(self.prefix)) for path in (bin_path, idx_path)]
        try:
            if error is None:
                self._finish(*temporaries)
        finally:
            for file in (self._bin, self._idx):
                if file is not None:
                    file.close()
            self._bin = self._idx = None
            for temporary in temporaries:
                temporary.unlink(missing_ok=True)

    def _check(self, tokens: npt.NDArray[Any], lengths: npt.NDArray[np.integer]) -> None:
        where = f"{bin_path(self.prefix)}: document {self.n_documents}"
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DataError(
                f"{where}: tokens must be one row of 64-bit integers, got {tokens.ndim} dimension(s) of {tokens.dtype}"
            )
        high, limits = int(tokens.max()), np.iinfo(self.dtype)
        if int(tokens.min()) < 0 or high > limits.max:
            at = int(np.argmax((tokens < 0) | (tokens > limits.max)))
            document = self.n_documents + int(np.searchsorted(np.cumsum(lengths), at, side="right"))
            raise DataError(
                f"{bin_path(self.prefix)}: document {document}: token id {tokens[at]} does not fit {self.dtype.name}, "
                f"which holds 0 .. {limits.max}"
            )
        longest = int(lengths.max())
        if longest > _LONGEST_SEQUENCE:
            raise DataError(f"{where}: {longest} tokens; the format holds at most {_LONGEST_SEQUENCE} a document")
        self.max_token_id = max(self.max_token_id, high)

    def _finish(self, temporary_bin: Path, temporary_idx: Path) -> None:
        if self._bin is None or self._idx is None:
            raise ValueError("the writer was not entered")
        flush_to_disk(self._bin)
        self._finish_index(self._idx)
        flush_to_disk(self._idx)
        # An older index must not meet the new tokens, not even for the moment between two renames.
        idx_path(self.prefix).unlink(missing_ok=True)
        flush_folder(self.prefix.parent)
        publish(temporary_bin, bin_path(self.prefix))
        publish(temporary_idx, idx_path(self.prefix))

    def _finish_index(self, idx: BinaryIO) -> None:
        """The lengths are there: add pointers and document indices, then the header."""
        n, begin = self.n_documents, 0
        for start in range(0, n, _CHUNK):
            idx.seek(_HEADER.size + 4 * start)
            sizes = np.frombuffer(idx.read(4 * min(_CHUNK, n - start)), "<i4").astype(np.int64) * self.dtype.itemsize
            ends = begin + np.cumsum(sizes)
            idx.seek(_HEADER.size + 4 * n + 8 * start)
            idx.write((ends - sizes).astype("<i8").data)
            begin = int(ends[-1])
        idx.seek(_HEADER.size + 12 * n)
        for start in range(0, n + 1, _CHUNK):
            idx.write(np.arange(start, min(start + _CHUNK, n + 1), dtype="<i8").data)
        idx.seek(0)
        idx.write(_HEADER.pack(MAGIC, VERSION, _CODE_OF_DTYPE[self.dtype], n, n + 1))


@dataclass(frozen=True, eq=False)
class TokenFile:
    """A pair, opened for reading and found to be in order."""

    prefix: Path
    dtype: np.dtype[np.integer]
    tokens: Tokens
    """The whole stream, (n_tokens,), mapped read-only."""
    _pointers: npt.NDArray[np.int64]
    _first_sequences: npt.NDArray[np.int64]

    @classmethod
    def open(cls, prefix: Path) -> TokenFile:
        """Check every size and offset of the pair, then map it.

        Raises:
            DataError: a file is missing, cut, or says something about the other that is not so; names the
                file, what was found and what would be right.
        """
        idx, tokens = idx_path(prefix), bin_path(prefix)
        idx_bytes, bin_bytes = _size_of(idx, prefix), _size_of(tokens, prefix)
        dtype, n_sequences, n_indices = _read_header(idx, idx_bytes)
        at = _HEADER.size
        lengths = _map(idx, np.dtype("<i4"), n_sequences, at)
        pointers = _map(idx, np.dtype("<i8"), n_sequences, at + 4 * n_sequences)
        first_sequences = _map(idx, np.dtype("<i8"), n_indices, at + 12 * n_sequences)
        _check_sequences(idx, tokens, lengths, pointers, dtype.itemsize, bin_bytes)
        _check_documents(idx, first_sequences, n_sequences)
        stream = _map(tokens, dtype, bin_bytes // dtype.itemsize, 0)
        return cls(prefix, dtype, stream, pointers, first_sequences)

    @property
    def n_tokens(self) -> int:
        """Tokens of all documents."""
        return self.tokens.size

    @property
    def n_sequences(self) -> int:
        """Sequences; as many as documents in files that megagpt wrote."""
        return self._pointers.size

    @property
    def n_documents(self) -> int:
        """Documents."""
        return self._first_sequences.size - 1

    def document(self, i: int) -> Tokens:
        """The tokens of document i, from 0.

        Raises:
            IndexError: there is no document i.
        """
        if not 0 <= i < self.n_documents:
            raise IndexError(f"{self.prefix}: document {i} of {self.n_documents}")
        return self.tokens[self._begin(self._first_sequences[i]) : self._begin(self._first_sequences[i + 1])]

    def window(self, start: int, length: int) -> Tokens:
        """`length` tokens of the stream from token `start`, whatever documents they belong to.

        Raises:
            IndexError: the window does not lie inside the stream.
        """
        if not 0 <= start <= start + length <= self.n_tokens:
            raise IndexError(f"{self.prefix}: tokens {start} .. {start + length} of {self.n_tokens}")
        return self.tokens[start : start + length]

    def documents(self, start: int, length: int) -> npt.NDArray[np.int32]:
        """Which document each token of `window(start, length)` belongs to, counted from 0 in the window: (length,).

        Documents without tokens are not counted.

        Raises:
            IndexError: the window does not lie inside the stream.
        """
        self.window(start, length)
        width = self.dtype.itemsize
        # Only the document that begins at the window's first token needs no mark: it is number 0 anyway.
        first = np.searchsorted(self._pointers, start * width, side="right")
        end = np.searchsorted(self._pointers, (start + length) * width, side="left")
        begun = slice(*np.searchsorted(self._first_sequences, [first, end]))
        marks = np.zeros(length, np.int32)
        marks[self._pointers[self._first_sequences[begun]] // width - start] = 1
        return np.cumsum(marks, dtype=np.int32)

    def _begin(self, sequence: np.int64) -> int:
        """Token at which a sequence begins; the end of the stream for the one after the last."""
        if sequence == self.n_sequences:
            return self.n_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize


def _size_of(path: Path, prefix: Path) -> int:
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        hint = f"; give the path without {prefix.suffix}" if prefix.suffix in (".bin", ".idx") else ""
        raise DataError(f"{path}: no such file; {prefix} must name a .bin/.idx pair{hint}") from None
    except OSError as error:
        raise unread(error, DataError, f"{path}: cannot be read: {error.strerror}") from None


def _read_header(idx: Path, idx_bytes: int) -> tuple[np.dtype[np.integer], int, int]:
    """The tokens' type and the numbers of sequences and document indices; the file's size agrees."""
    with idx.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise DataError(f"{idx}: {len(header)} bytes, cut inside the header of {_HEADER.size} bytes")
    magic, version, code, n_sequences, n_indices = _HEADER.unpack(header)
    if magic != MAGIC:
        raise DataError(f"{idx}: begins with {magic!r}, expected {MAGIC!r}: not a Megatron token index")
    if version != VERSION:
        raise DataError(f"{idx}: version {version}, expected {VERSION}")
    if code not in DTYPE_OF_CODE:
        known = ", ".join(f"{code} ({dtype.name})" for code, dtype in DTYPE_OF_CODE.items())
        raise DataError(f"{idx}: type code {code}, expected one of {known}")
    if n_indices < 1:
        raise DataError(f"{idx}: 0 document indices, expected documents + 1")
    expected = _HEADER.size + 12 * n_sequences + 8 * n_indices
    if idx_bytes != expected:
        raise DataError(
            f"{idx}: {idx_bytes} bytes, expected {expected} for the {n_sequences} sequences and {n_indices} "
            "document indices that its header counts: the file is cut, damaged, or a multimodal one"
        )
    return DTYPE_OF_CODE[code], n_sequences, n_indices


def _map(path: Path, dtype: np.dtype[Any], count: int, offset: int) -> npt.NDArray[Any]:
    if count == 0:  # nothing can be mapped, and nothing needs to be
        empty = np.empty(0, dtype)
        empty.flags.writeable = False
        return empty
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def _check_sequences(
    idx: Path,
    tokens: Path,
    lengths: npt.NDArray[np.int32],
    pointers: npt.NDArray[np.int64],
    itemsize: int,
    bin_bytes: int,
) -> None:
    """Sequences follow each other without a gap, from byte 0 to the end of the .bin file."""
    begin = 0
    for start in range(0, lengths.size, _CHUNK):
        sizes = lengths[start : start + _CHUNK].astype(np.int64) * itemsize
        if sizes.min() < 0:
            bad = int(np.argmax(sizes < 0))
            raise DataError(f"{idx}: sequence {start + bad} has length {lengths[start + bad]}, expected 0 or more")
        ends = begin + np.cumsum(sizes)
        wrong = pointers[start : start + _CHUNK] != ends - sizes
        if wrong.any():
            bad = int(np.argmax(wrong))
            raise DataError(
                f"{idx}: sequence {start + bad} begins at byte {pointers[start + bad]}, expected byte "
                f"{ends[bad] - sizes[bad]}, where the sequence before it ends"
            )
        begin = int(ends[-1])
    if begin != bin_bytes:
        raise DataError(f"{tokens}: {bin_bytes} bytes, expected {begin}, where the last sequence of {idx.name} ends")


def _check_documents(idx: Path, first_sequences: npt.NDArray[np.int64], n_sequences: int) -> None:
    """Document indices rise from 0 to the number of sequences."""
    if first_sequences[0] != 0:
        raise DataError(f"{idx}: the first document index is {first_sequences[0]}, expected 0")
    if first_sequences[-1] != n_sequences:
        raise DataError(
            f"{idx}: the last document index is {first_sequences[-1]}, expected {n_sequences}, the number of sequences"
        )
    for start in range(0, first_sequences.size - 1, _CHUNK):
        part = first_sequences[start : start + _CHUNK + 1]
        falls = part[1:] < part[:-1]
        if falls.any():
            bad = start + int(np.argmax(falls)) + 1
            raise DataError(
                f"{idx}: document index {bad} is {first_sequences[bad]}, expected at least "
                f"{first_sequences[bad - 1]}, the one before it"
            )
