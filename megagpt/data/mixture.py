"""Which tokens sample i of a run is made of: arithmetic on files, weights, seq_len, seed and i alone.

A token file is cut into windows of seq_len + 1 tokens at stride seq_len: window w begins at token w *
seq_len, so that a token is predicted once an epoch; the file's first is only read, and up to seq_len - 1 at
its end are not used. Documents run into each other, separated by the tokenizer's end-of-text token;
`documents(i)` tells them apart. The order of samples does not depend on how many processes read them, and going
on from sample i needs no state but i.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megagpt.config.schema import WeightedTokens
from megagpt.data.indexed import TokenFile, bin_path, idx_path
from megagpt.data.manifest import check_counts, read_manifest
from megagpt.data.order import order_key, permute
from megagpt.errors import DataError

Sample = npt.NDArray[np.int64]
"""(seq_len + 1,) token ids: inputs are all but the last, targets all but the first."""

Documents = npt.NDArray[np.int32]
"""(seq_len + 1,): the document of each token of a sample, counted from 0 in the sample."""

_PROBES = 64  # blocks of a .bin file that go into its fingerprint
_PROBE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Split:
    """An inner node of the tree that deals samples out to files: numerator / denominator of them go left."""

    numerator: int
    denominator: int
    left: Split | int
    right: Split | int

    def n_left(self, n: int) -> int:
        """How many of the first n samples go left: the share, rounded to the nearest (a half up)."""
        return (2 * n * self.numerator + self.denominator) // (2 * self.denominator)


@dataclass(frozen=True, slots=True)
class FileShare:
    """What a plan of so many samples takes from one file."""

    prefix: Path
    n_tokens: int
    n_documents: int
    n_windows: int
    """Samples in one epoch of the file."""
    share: float
    """Fraction of the mixture's samples."""
    n_samples: int
    """Samples of the plan that come from here."""
    epochs: float
    """How often the plan sees each window."""


@dataclass(frozen=True)
class Mixture:
    """Token files and the share of samples that each gives."""

    files: tuple[TokenFile, ...]
    weights: tuple[Fraction, ...]
    """Adding up to 1."""
    seq_len: int
    seed: int
    tokenizer: dict[str, Any] | None
    """`Tokenizer.describe()` as the manifests say; None where no file has a manifest."""
    max_token_id: int | None
    """Largest id in any file; None where a file has no manifest to say so."""
    fingerprint: str
    """Of all that samples depend on (`_fingerprint`); a run that goes on must find the same."""
    _tree: Split | int

    def sample(self, i: int) -> Sample:
        """Sample i, for any i from 0: epochs follow each other without end."""
        token_file, start = self._window(i)
        return token_file.window(start, self.seq_len + 1).astype(np.int64)

    def documents(self, i: int) -> Documents:
        """Which document each token of sample i belongs to, by the file's index."""
        token_file, start = self._window(i)
        return token_file.documents(start, self.seq_len + 1)

    def _window(self, i: int) -> tuple[TokenFile, int]:
        """The file of sample i, and the token at which it begins there."""
        file_number, k = self.locate(i)
        token_file = self.files[file_number]
        n_windows = count_windows(token_file, self.seq_len)
        epoch, position = divmod(k, n_windows)
        window = permute(position, n_windows, order_key(self.seed, file_number, epoch))
        return token_file, window * self.seq_len

    def locate(self, i: int) -> tuple[int, int]:
        """(f, k): sample i is the k-th one that comes from file f, both from 0."""
        if i < 0:
            raise IndexError(f"sample {i}: samples are counted from 0")
        node = self._tree
        while isinstance(node, Split):
            before, after = node.n_left(i), node.n_left(i + 1)
            if after > before:
                node, i = node.left, before
            else:
                node, i = node.right, i - before
        return node, i

    def counts(self, n: int) -> list[int]:
        """How many of the first n samples come from each file: less than 2 away from n * weight (`deal`)."""
        counts = [0] * len(self.files)
        nodes = [(self._tree, n)]
        while nodes:
            node, count = nodes.pop()
            if isinstance(node, Split):
                n_left = node.n_left(count)
                nodes += [(node.left, n_left), (node.right, count - n_left)]
            else:
                counts[node] = count
        return counts

    def describe(self, n_samples: int) -> list[FileShare]:
        """What a run of `n_samples` samples takes from each file."""
        shares = []
        for token_file, weight, count in zip(self.files, self.weights, self.counts(n_samples), strict=True):
            n_windows = count_windows(token_file, self.seq_len)
            shares.append(
                FileShare(
                    prefix=token_file.prefix,
                    n_tokens=token_file.n_tokens,
                    n_documents=token_file.n_documents,
                    n_windows=n_windows,
                    share=float(weight),
                    n_samples=count,
                    epochs=count / n_windows,
                )
            )
        return shares


@dataclass(frozen=True)
class EvenWindows:
    """The same windows of one file each time, spread evenly over it, in file order: for validation."""

    token_file: TokenFile
    seq_len: int
    n_windows: int
    """Windows in the whole file."""
    n_samples: int

    def __len__(self) -> int:
        return self.n_samples

    def sample(self, i: int) -> Sample:
        """Sample i of `len(self)`: window floor(i * n_windows / n_samples)."""
        return self.token_file.window(self._start(i), self.seq_len + 1).astype(np.int64)

    def documents(self, i: int) -> Documents:
        """Which document each token of sample i belongs to, by the file's index."""
        return self.token_file.documents(self._start(i), self.seq_len + 1)

    def _start(self, i: int) -> int:
        if not 0 <= i < self.n_samples:
            raise IndexError(f"{self.token_file.prefix}: validation sample {i} of {self.n_samples}")
        return i * self.n_windows // self.n_samples * self.seq_len


def open_mixture(train: Path | tuple[WeightedTokens, ...], seq_len: int, seed: int) -> Mixture:
    """Open `data.train`: one pair, or several with weights.

    Args:
        train: the path of a .bin/.idx pair without the ending, or a list of them with weights.
        seq_len: tokens that the model reads in a sample; a sample has one more.
        seed: of the order of samples.

    Raises:
        DataError: a pair is damaged or too small for one sample, does not agree with its manifest, or the
            pairs were made with different tokenizers.
    """
    prefixes = [train] if isinstance(train, Path) else [part.prefix for part in train]
    # The decimal number that the user wrote, not the binary one beside it: 0.7 and 0.3 are 7 to 3.
    raw = [Fraction(1)] if isinstance(train, Path) else [Fraction(repr(part.weight)) for part in train]
    if not prefixes:
        raise DataError("data.train is an empty list; name at least one {prefix, weight}")
    files = tuple(TokenFile.open(prefix) for prefix in prefixes)
    for token_file in files:
        count_windows(token_file, seq_len)
    weights = tuple(weight / sum(raw) for weight in raw)
    tokenizer, max_token_id = _agreed_tokenizer(files)
    return Mixture(
        files=files,
        weights=weights,
        seq_len=seq_len,
        seed=seed,
        tokenizer=tokenizer,
        max_token_id=max_token_id,
        fingerprint=_fingerprint(files, weights, seq_len, seed),
        _tree=deal(weights),
    )


def sequential_windows(token_file: TokenFile, seq_len: int, n: int) -> EvenWindows:
    """Up to n windows, spread evenly over a file; all of them where there are fewer.

    Raises:
        DataError: the file is too small for one.
    """
    n_windows = count_windows(token_file, seq_len)
    return EvenWindows(token_file, seq_len, n_windows, min(n, n_windows))


def count_windows(token_file: TokenFile, seq_len: int) -> int:
    """Windows of seq_len + 1 tokens at stride seq_len.

    Raises:
        DataError: there is not one.
    """
    n_windows = (token_file.n_tokens - 1) // seq_len
    if n_windows < 1:
        raise DataError(
            f"{bin_path(token_file.prefix)}: {token_file.n_tokens} tokens, but one sample needs "
            f"{seq_len + 1} (a sequence of {seq_len} and the token after it)"
        )
    return n_windows


def deal(weights: Sequence[Fraction]) -> Split | int:
    """The tree that deals samples out to files in proportion to their weights, exactly, at any sample.

    It is the Huffman tree of the weights; each node rounds its share to the nearest sample. So after any n
    samples a file's count is less than 2 away from n * weight: a level adds at most 1/2 to the error and
    passes on the error from above times its share, and two levels of a Huffman tree together pass on at most
    half: the sibling of a node's parent weighs no less than the node.
    """
    heap: list[tuple[Fraction, int, Split | int]] = [(weight, i, i) for i, weight in enumerate(weights)]
    heapq.heapify(heap)
    made = len(heap)
    while len(heap) > 1:
        light, _, right = heapq.heappop(heap)
        heavy, _, left = heapq.heappop(heap)
        share = heavy / (heavy + light)
        node = Split(share.numerator, share.denominator, left, right)
        heapq.heappush(heap, (heavy + light, made, node))
        made += 1
    return heap[0][2]


def _agreed_tokenizer(files: Sequence[TokenFile]) -> tuple[dict[str, Any] | None, int | None]:
    """The tokenizer that all manifests name, and the largest token id where all files have one."""
    named: tuple[Path, dict[str, Any]] | None = None
    largest: list[int] = []
    for token_file in files:
        manifest = read_manifest(token_file.prefix)
        if manifest is None:
            continue
        largest.append(check_counts(token_file, manifest).max_token_id)
        found = manifest.tokenizer
        if named is None:
            named = (token_file.prefix, found)
        elif named[1].get("fingerprint") != found.get("fingerprint"):
            raise DataError(
                f"{token_file.prefix} was made with another tokenizer than {named[0]}: "
                f"{_one_line(found)} and {_one_line(named[1])}; token files of a mixture must share one"
            )
    return named[1] if named else None, max(largest) if len(largest) == len(files) else None


def _one_line(tokenizer: dict[str, Any]) -> str:
    return ", ".join(f"{key} {tokenizer[key]}" for key in ("kind", "vocab_size", "fingerprint") if key in tokenizer)


def _fingerprint(files: Sequence[TokenFile], weights: Sequence[Fraction], seq_len: int, seed: int) -> str:
    """Changes with the files' content or order, a weight, seq_len or the seed.

    Of each file it takes the whole index and 64 blocks spread over the tokens, so that it takes no time at any
    size; it depends neither on the files' place nor on a manifest. `verify_token_file` compares every byte.
    """
    hasher = xxhash.xxh3_128(f"{seq_len},{seed}".encode())
    for token_file, weight in zip(files, weights, strict=True):
        hasher.update(f"|{weight},{token_file.dtype.name},{token_file.n_tokens}|".encode())
        _probe(hasher, token_file.prefix)
    return hasher.hexdigest()


def _probe(hasher: xxhash.xxh3_128, prefix: Path) -> None:
    with idx_path(prefix).open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    with bin_path(prefix).open("rb") as file:
        size = file.seek(0, 2)
        for probe in range(_PROBES):
            file.seek(max(0, size - _PROBE_BYTES) * probe // (_PROBES - 1))
            hasher.update(file.read(_PROBE_BYTES))
