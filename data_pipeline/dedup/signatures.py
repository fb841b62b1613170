"""Per shard: the content hash of every kept document, and its LSH band keys.

signatures.parquet   doc_id, hash_high, hash_low (xxh3_128 of the normalised text), n_words, text_bytes; rising doc_id
bands.parquet        band_key, doc_id; runs of some million rows, each sorted by key: a partition of the keys reads only
                     its part of each run, by the statistics of the row groups
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.dedup.minhash import MinHasher, Signed, Signer
from data_pipeline.dedup.row_files import RowsWriter
from data_pipeline.parquet_reader import open_rows
from data_pipeline.tasks import Counts, Progress

SIGNATURES_FILE = "signatures.parquet"
BANDS_FILE = "bands.parquet"
BANDS_ROW_GROUP = 1 << 14
"""Rows: a 128th of a run, and so of all keys."""

_BATCH_DOCUMENTS = 1024
RUN_ROWS = 1 << 21
"""Rows of a sorted run: 32 MB of keys and ids, and as much again while they are sorted."""
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


class Runs:
    """Collects band keys and writes a sorted run whenever enough of them have come together."""

    def __init__(self, writer: RowsWriter) -> None:
        self._writer = writer
        self._keys: list[NDArray[np.uint64]] = []
        self._ids: list[NDArray[np.int64]] = []
        self._n_rows = 0

    def add(self, keys: NDArray[np.uint64], doc_ids: NDArray[np.int64]) -> None:
        """Keys (n, bands) of documents (n,) of rising ids."""
        self._keys.append(keys.reshape(-1))
        self._ids.append(np.repeat(doc_ids, keys.shape[1]))
        self._n_rows += keys.size
        if self._n_rows >= RUN_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what there is as one run."""
        if self._n_rows:
            keys, ids = np.concatenate(self._keys), np.concatenate(self._ids)
            order = np.argsort(keys, kind="stable")
            self._writer.write(pa.table([keys[order], ids[order]], schema=BANDS_SCHEMA))
            self._writer.end_group()
        self._keys, self._ids, self._n_rows = [], [], 0


def write_signatures(
    folder: Path, documents: Path, hasher: MinHasher | None, progress: Progress | None = None
) -> Counts:
    """Write both files for one shard. In memory: one run of band keys and one batch of texts.

    Args:
        folder: where to.
        documents: docs.parquet of the shard, in rising doc_id.
        hasher: None without near-duplicate removal: bands.parquet is empty then.
        progress: called with bytes of text and documents.
    """
    signer = Signer(hasher)
    n_short = 0
    with (
        open_rows(documents) as file,
        RowsWriter(folder / SIGNATURES_FILE, SIGNATURES_SCHEMA) as rows,
        RowsWriter(folder / BANDS_FILE, BANDS_SCHEMA, BANDS_ROW_GROUP) as bands,
    ):
        runs = Runs(bands)
        for batch in file.iter_batches(_BATCH_DOCUMENTS, columns=["doc_id", "text"]):
            doc_ids = batch.column("doc_id").to_numpy()
            text, ends = utf8_of(batch.column("text"))
            signed = signer.sign(text, ends)
            rows.write(_rows(doc_ids, signed, np.diff(ends)))
            if hasher is not None:
                long_enough = signed.n_words >= hasher.ngram
                n_short += int((~long_enough).sum())
                runs.add(signed.band_keys[long_enough], doc_ids[long_enough])
            if progress is not None:
                progress(int(ends[-1] - ends[0]), len(doc_ids))
        runs.flush()
    return Counts(rows.n_rows, rows.n_rows, detail={"too_short_for_minhash": n_short})


def utf8_of(column: pa.Array) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The bytes under an Arrow array of strings without nulls, not copied, and (n + 1,) where each string begins."""
    large = pa.types.is_large_string(column.type)
    _, offsets, data = column.buffers()
    if offsets is None or data is None:
        return np.empty(0, np.uint8), np.zeros(len(column) + 1, np.int64)
    starts = np.frombuffer(offsets, np.int64 if large else np.int32)
    text = np.frombuffer(data, np.uint8)
    text.flags.writeable = False
    return text, starts[column.offset : column.offset + len(column) + 1].astype(np.int64)


def _rows(doc_ids: NDArray[np.int64], signed: Signed, text_bytes: NDArray[np.int64]) -> pa.Table:
    hashes = signed.content_hashes
    high = np.array([h >> 64 for h in hashes], np.uint64)
    low = np.array([h & _LOW_64 for h in hashes], np.uint64)
    return pa.table([doc_ids, high, low, signed.n_words, text_bytes], schema=SIGNATURES_SCHEMA)
