"""The definitions of deduplication in plain Python, and the corpora that its tests are made on."""

import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_pipeline.dedup.minhash import SEED, SHINGLE_BASE, MinHasher

_64 = (1 << 64) - 1


def words_of(text: str) -> list[str]:
    lower = "".join({"\u0130": "i", "\u03c2": "\u03c3"}.get(c, c.lower()) for c in text)
    return re.findall(r"[^\W_]+", lower)


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _64
    return x ^ (x >> 31)


def word_hash(word: str) -> int:
    value = 0xCBF29CE484222325
    for character in word:
        value = (value ^ ord(character)) * 0x100000001B3 & _64
    return mix(value)


def shingles_of(text: str, ngram: int) -> list[int]:
    hashes = [word_hash(word) for word in words_of(text)]
    return [
        mix(sum(h * SHINGLE_BASE ** (ngram - 1 - j) for j, h in enumerate(hashes[i : i + ngram])) & _64)
        for i in range(len(hashes) - ngram + 1)
    ]


def minima_of(text: str, hasher: MinHasher) -> list[int] | None:
    shingles = shingles_of(text, hasher.ngram)
    n = hasher.bands * hasher.rows
    functions = [(mix(SEED + 2 * k + 1) | 1, mix(SEED + 2 * k + 2)) for k in range(n)]
    return [min((a * x + b & _64) >> 32 for x in shingles) for a, b in functions] if shingles else None


def band_keys_of(minima: Sequence[int], hasher: MinHasher) -> list[int]:
    keys = []
    for band in range(hasher.bands):
        key = mix(SEED + band)
        for k in range(band * hasher.rows, (band + 1) * hasher.rows):
            key = mix(key ^ minima[k])
        keys.append(key)
    return keys


def content_hash_of(text: str) -> int:
    return xxhash.xxh3_128_intdigest((" ".join(words_of(text)) or text).encode())


def jaccard_of(a: str, b: str, n: int) -> float:
    """Of the sets of word n-grams themselves, without any hash."""
    x, y = ({tuple(w[i : i + n]) for i in range(len(w) - n + 1)} for w in (words_of(a), words_of(b)))
    return len(x & y) / len(x | y) if x | y else 0.0


def utf8(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    parts = [text.encode() for text in texts]
    return np.frombuffer(b"".join(parts), np.uint8), np.cumsum([0, *map(len, parts)])


def components(edges: Sequence[tuple[int, int]], nodes: Sequence[int]) -> dict[int, int]:
    """Node -> smallest node of its component, by relabelling until nothing changes."""
    root = {node: node for node in nodes}
    changed = True
    while changed:
        changed = False
        for a, b in edges:
            low = min(root[a], root[b])
            changed |= root[a] != low or root[b] != low
            root[a] = root[b] = low
    return root


def random_text(seed: int, n_words: int = 120, vocabulary: int = 5000) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(vocabulary)}" for _ in range(n_words))


def with_words_changed(text: str, share: float, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(f"x{rng.randrange(10**9)}" if rng.random() < share else word for word in text.split(" "))


def write_documents(path: Path, documents: dict[int, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"doc_id": pa.array(documents, pa.int64()), "text": pa.array(documents.values(), pa.string())}
    pq.write_table(pa.table(columns), path)
    return path
