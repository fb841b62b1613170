"""Per shard: the content hash of every kept document, and its LSH band keys.

signatures.parquet   doc_id, hash_high, hash_low (xxh3_128 of the normalised text), n_words, text_bytes
bands.parquet        band_key, doc_id, sorted by key, in row groups: a partition of keys reads only its part
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from data_pipeline.dedup.minhash import MinHasher, normalise
from data_pipeline.tasks import Counts, Progress

SIGNATURES_FILE = "signatures.parquet"
BANDS_FILE = "bands.parquet"

_BATCH_DOCUMENTS = 256
_ROW_GROUP = 1 << 17
_LOW_64 = (1 << 64) - 1

SIGNATURES_SCHEMA = pa.schema(
    [
        ("doc_id", pa.int64()),
        ("hash_high", pa.uint64()),
        ("hash_low", pa.uint64()),
        ("n_words", pa.int64()),
        ("text_bytes", pa.int64()),
    ]
)
BANDS_SCHEMA = pa.schema([("band_key", pa.uint64()), ("doc_id", pa.int64())])


def write_signatures(
    folder: Path, documents: Path, hasher: MinHasher | None, progress: Progress | None = None
) -> Counts:
    """Write both files for one shard. In memory: 40 bytes a document and 16 a band of it, and one batch of texts.

    Args:
        folder: where to.
        documents: docs.parquet of the shard.
        hasher: None without near-duplicate removal: bands.parquet is empty then.
        progress: called with bytes of text and documents.
    """
    bands: list[tuple[NDArray[np.uint64], NDArray[np.int64]]] = []
    tables = [SIGNATURES_SCHEMA.empty_table()]
    n_short = 0
    with pq.ParquetFile(documents) as file:
        for batch in file.iter_batches(_BATCH_DOCUMENTS, columns=["doc_id", "text"]):
            doc_ids = batch.column("doc_id").to_numpy()
            texts = batch.column("text").to_pylist()
            normalised = [normalise(text) for text in texts]
            rows = _rows(doc_ids, texts, normalised)
            tables.append(rows)
            if hasher is not None:
                positions, minima = hasher.signatures(normalised)
                n_short += len(texts) - len(positions)
                keys = hasher.band_keys(minima)
                bands.append((keys.reshape(-1), np.repeat(doc_ids[positions], hasher.bands)))
            if progress is not None:
                progress(sum(rows.column("text_bytes").to_pylist()), len(texts))
    table = pa.concat_tables(tables)
    pq.write_table(table, folder / SIGNATURES_FILE, compression="zstd", row_group_size=_ROW_GROUP)
    _write_bands(folder / BANDS_FILE, bands)
    return Counts(len(table), len(table), detail={"too_short_for_minhash": n_short})


def content_hash(text: str, normalised: str) -> int:
    """The xxh3_128 of the normalised text; of the text itself where nothing but punctuation is in it."""
    return xxhash.xxh3_128_intdigest((normalised or text).encode())


def _rows(doc_ids: NDArray[np.int64], texts: list[str], normalised: list[str]) -> pa.Table:
    hashes = [content_hash(text, words) for text, words in zip(texts, normalised, strict=True)]
    return pa.table(
        {
            "doc_id": doc_ids,
            "hash_high": np.array([h >> 64 for h in hashes], np.uint64),
            "hash_low": np.array([h & _LOW_64 for h in hashes], np.uint64),
            "n_words": np.array([words.count(" ") + 1 if words else 0 for words in normalised], np.int64),
            "text_bytes": np.array([len(text.encode()) for text in texts], np.int64),
        },
        schema=SIGNATURES_SCHEMA,
    )


def _write_bands(path: Path, bands: list[tuple[NDArray[np.uint64], NDArray[np.int64]]]) -> None:
    keys = np.concatenate([k for k, _ in bands]) if bands else np.empty(0, np.uint64)
    ids = np.concatenate([i for _, i in bands]) if bands else np.empty(0, np.int64)
    order = np.lexsort((ids, keys))
    table = pa.table({"band_key": keys[order], "doc_id": ids[order]}, schema=BANDS_SCHEMA)
    pq.write_table(table, path, compression="zstd", row_group_size=_ROW_GROUP)
