"""Where runs of words of benchmark documents stand in token files: the part that worker processes do, without torch.

A document's tokens are decoded in windows that overlap, so that memory does not grow with it. A window's first and last
word may be cut and do not count there; they are whole in the window before or after. Only a run of 13 words of more
than `OVERLAP_TOKENS` tokens could be missed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megagpt.data.indexed import TokenFile
from megagpt.text.ngrams import MAX_ITEMS, ItemNgrams, bloom_bytes, find_ngrams, set_bloom_bits
from megagpt.text.word_hashes import UInt64Array, hash_words
from megagpt.tokenizer import Tokenizer, open_tokenizer

WINDOW_TOKENS = 1 << 16
OVERLAP_TOKENS = 1 << 11
EXAMPLES = 3

_PART_TOKENS = 1 << 22
"""Of one piece of work."""
Arrays = dict[str, NDArray[Any]]
_ARRAYS = ("hashes", "offsets", "numbers", "bloom", "lengths")


@dataclass(frozen=True, slots=True)
class Found:
    """What documents share with one item."""

    documents: int = 0
    ngrams: int = 0
    """The most different n-grams of the item in one document."""
    examples: tuple[tuple[str, int], ...] = ()
    """(token file, document in it) of the first ones."""

    def with_more(self, other: Found) -> Found:
        """Both together."""
        examples = tuple(sorted({*self.examples, *other.examples})[:EXAMPLES])
        return Found(self.documents + other.documents, max(self.ngrams, other.ngrams), examples)


@dataclass
class Findings:
    """Of any number of documents."""

    tokens: int = 0
    documents: int = 0
    items: dict[int, Found] = field(default_factory=dict)
    """Item -> what is shared with it."""

    def add(self, other: Findings) -> None:
        """Add those of other documents."""
        self.tokens += other.tokens
        self.documents += other.documents
        for item, found in other.items.items():
            self.items[item] = self.items.get(item, Found()).with_more(found)


def write_index(folder: Path, items: Sequence[ItemNgrams], tasks: Sequence[str]) -> NDArray[np.int64]:
    """Write the n-grams of all items as arrays that every worker maps; about 12 bytes an n-gram in memory.

    N-grams that more than MAX_ITEMS items of one task share are the task's wording and are left out.

    Args:
        folder: where to.
        items: n-grams of each item.
        tasks: the task of each item.

    Returns:
        (items,): how many n-grams each item is left with.
    """
    hashes = np.concatenate([np.empty(0, np.uint64), *(item.hashes for item in items)])
    numbers = np.repeat(np.arange(len(items)), [len(item.hashes) for item in items]).astype(np.int32)
    names = {task: i for i, task in enumerate(dict.fromkeys(tasks))}
    task_of = np.array([names[task] for task in tasks], np.int32)
    order = np.lexsort((numbers, task_of[numbers], hashes))
    hashes, numbers = hashes[order], numbers[order]
    begins = np.ones(len(hashes), bool)
    begins[1:] = (hashes[1:] != hashes[:-1]) | (task_of[numbers[1:]] != task_of[numbers[:-1]])
    sizes = np.diff(np.append(np.flatnonzero(begins), len(hashes)))
    shared = np.unique(hashes[begins][sizes > MAX_ITEMS])
    kept = ~np.isin(hashes, shared)
    hashes, numbers = hashes[kept], numbers[kept]
    unique, starts = np.unique(hashes, return_index=True)
    bloom = np.zeros(bloom_bytes(len(unique)), np.uint8)
    set_bloom_bits(bloom, unique)
    bounds = np.append(starts, len(hashes)).astype(np.int64)
    arrays: list[NDArray[Any]] = [unique, bounds, numbers, bloom, _lengths(items)]
    for name, array in zip(_ARRAYS, arrays, strict=True):
        np.save(folder / f"{name}.npy", array)
    return np.bincount(numbers, minlength=len(items))


def scan_all(
    prefixes: Sequence[Path], index: Path, tokenizer: Path, processes: int, on_tokens: Callable[[int], None]
) -> Findings:
    """Scan all documents of token files.

    Args:
        prefixes: of the .bin/.idx pairs.
        index: folder that `write_index` wrote.
        tokenizer: folder that the tokenizer was saved in.
        processes: worker processes; with 1 the work is done in this one.
        on_tokens: told how many tokens a finished piece of work had.

    Raises:
        DataError: a pair is damaged, or holds tokens that the tokenizer has not.
    """
    files = {prefix: TokenFile.open(prefix) for prefix in prefixes}
    parts = [(prefix, part) for prefix, file in files.items() for part in _parts(file)]
    everything = Findings()
    if processes == 1:
        arrays, decoder = _open_index(index), open_tokenizer(tokenizer)
        for prefix, part in parts:
            everything.add(found := scan(files[prefix], part, arrays, decoder))
            on_tokens(found.tokens)
        return everything
    with ProcessPoolExecutor(min(processes, max(1, len(parts))), mp_context=get_context("spawn")) as pool:
        try:
            for done in as_completed([pool.submit(_scan_part, *part, index, tokenizer) for part in parts]):
                everything.add(found := done.result())
                on_tokens(found.tokens)
        finally:  # after an error or Ctrl-C, parts that have not begun need not; otherwise none is left
            pool.shutdown(cancel_futures=True)
    return everything


def scan(file: TokenFile, documents: range, index: Arrays, tokenizer: Tokenizer) -> Findings:
    """Scan some documents of a token file."""
    found = Findings()
    for document in documents:
        tokens = file.document(document)
        found.tokens += len(tokens)
        found.documents += 1
        for item, count in _items_in(tokens, tokenizer, index):
            here = Found(1, count, ((str(file.prefix), document),))
            found.items[item] = found.items.get(item, Found()).with_more(here)
    return found


def words_in_windows(
    tokens: NDArray[np.integer], tokenizer: Tokenizer, window: int = WINDOW_TOKENS, overlap: int = OVERLAP_TOKENS
) -> Iterator[UInt64Array]:
    """Hashes of a document's words, window by window; the sizes are in tokens."""
    n = len(tokens)
    start = 0
    while True:
        end = min(start + window, n)
        words = hash_words(tokenizer.decode(tokens[start:end].tolist())).hashes
        yield words[(1 if start else 0) : (len(words) - 1 if end < n else len(words))]
        if end == n:
            return
        start = end - overlap


def _items_in(tokens: NDArray[np.integer], tokenizer: Tokenizer, arrays: Arrays) -> list[tuple[int, int]]:
    """(item, number of its different n-grams in the document)."""
    ngrams: set[int] = set()
    for words in words_in_windows(tokens, tokenizer):
        found = find_ngrams(words, arrays["lengths"], arrays["hashes"], arrays["bloom"])
        ngrams.update(found[2].tolist())
    if not ngrams:
        return []
    offsets, numbers = arrays["offsets"], arrays["numbers"]
    items = np.concatenate([numbers[int(offsets[place]) : int(offsets[place + 1])] for place in sorted(ngrams)])
    return list(zip(*(array.tolist() for array in np.unique(items, return_counts=True)), strict=True))


def _lengths(items: Sequence[ItemNgrams]) -> NDArray[np.int64]:
    return np.array(sorted({length for item in items for length in item.lengths}), np.int64)


def _parts(file: TokenFile) -> Iterator[range]:
    """Documents in pieces of about equal numbers of tokens."""
    first, tokens = 0, 0
    for document in range(file.n_documents):
        tokens += len(file.document(document))
        if tokens >= _PART_TOKENS:
            yield range(first, document + 1)
            first, tokens = document + 1, 0
    if first < file.n_documents:
        yield range(first, file.n_documents)


def _scan_part(prefix: Path, documents: range, index: Path, tokenizer: Path) -> Findings:
    """In a worker process, which lives for one scan: what it has opened stays open."""
    return scan(_token_file(prefix), documents, _index(index), _tokenizer(tokenizer))


def _open_index(folder: Path) -> Arrays:
    # Plain arrays over the mapped memory: the compiled loops know no other type.
    return {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in _ARRAYS}


_index = functools.cache(_open_index)
_tokenizer = functools.cache(open_tokenizer)
_token_file = functools.cache(TokenFile.open)
