"""Shards as the encode stage leaves them, for tests of what comes after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.encode import ENCODED_FILE, ENCODED_SCHEMA, TOKENS_PREFIX
from megagpt.data.indexed import TokenFile, TokenFileWriter


def document(i: int) -> list[int]:
    """Document i is the tokens [i % 1000, i % 1000, ..., 0], of length 2 .. 6."""
    return [i % 1000] * (1 + i % 5) + [0]


def encoded_shard(folder: Path, doc_ids: Sequence[int], source: Callable[[int], str] = lambda _: "web") -> Path:
    """Documents with content hash (i, i + 1) and ten bytes of text a token."""
    folder.mkdir(parents=True)
    lengths = np.array([len(document(i)) for i in doc_ids], np.int64)
    with TokenFileWriter(folder / TOKENS_PREFIX, np.uint16) as writer:
        for i in doc_ids:
            writer.add_document(document(i))
    ids = np.array(doc_ids, np.int64)
    columns = [ids, ids.astype(np.uint64), ids.astype(np.uint64) + np.uint64(1), lengths * 10, lengths]
    arrays = [*map(pa.array, columns), pa.array([source(i) for i in doc_ids], pa.string())]
    pq.write_table(pa.Table.from_arrays(arrays, schema=ENCODED_SCHEMA), folder / ENCODED_FILE)
    return folder


def documents_of(prefix: Path) -> list[list[int]]:
    file = TokenFile.open(prefix)
    return [file.document(i).tolist() for i in range(file.n_documents)]
