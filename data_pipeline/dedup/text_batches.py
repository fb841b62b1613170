"""The documents of a shard that take part in passage dedup, as UTF-8 bytes that compiled loops read in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.dedup.clusters import is_removed, read_removed
from data_pipeline.dedup.signatures import utf8_of
from data_pipeline.parquet_reader import open_rows

_BATCH_BYTES = 4 << 20
"""Text handed out at a time, one document at least: what the loops write beside it is a few times as large."""


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Some documents in rising order of their ids."""

    doc_ids: NDArray[np.int64]
    """(n,)."""
    text: pa.StringArray
    """(n,)."""

    def __len__(self) -> int:
        return len(self.doc_ids)

    def utf8(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Bytes and offsets (n + 1,): the i-th text is bytes[offsets[i]:offsets[i + 1]]; no copy."""
        return utf8_of(self.text)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all its texts."""
        _, offsets = self.utf8()
        return int(offsets[-1] - offsets[0])

    def select(self, mask: NDArray[np.bool_]) -> TextBatch:
        """The documents where the mask (n,) is true."""
        return self if mask.all() else TextBatch(self.doc_ids[mask], self.text.filter(pa.array(mask)))


def text_batches(documents: Path, clusters: Path | None) -> Iterator[TextBatch]:
    """The documents of a shard that document dedup left, about 4 MiB of text at a time.

    Args:
        documents: docs.parquet of the shard.
        clusters: clusters.parquet of the job; None where nothing was removed.
    """
    found = doc_id_range(documents)
    removed = np.empty(0, np.int64) if clusters is None or found is None else read_removed(clusters, *found)
    with open_rows(documents) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["doc_id", "text"]).combine_chunks()
            if not len(table):
                continue
            doc_ids = table.column("doc_id").chunk(0).to_numpy()
            text = table.column("text").chunk(0)
            for first, last in _cuts(text):
                batch = TextBatch(doc_ids[first:last], text.slice(first, last - first))
                yield batch.select(~is_removed(batch.doc_ids, removed))


def doc_id_range(documents: Path) -> tuple[int, int] | None:
    """First and last id of a file whose rows are in rising order of doc_id, from its statistics; None if empty."""
    metadata = pq.read_metadata(documents)
    column = metadata.schema.to_arrow_schema().get_field_index("doc_id")
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups) if metadata.row_group(i).num_rows]
    if not groups:
        return None
    return groups[0].column(column).statistics.min, groups[-1].column(column).statistics.max


def _cuts(text: pa.StringArray) -> Iterator[tuple[int, int]]:
    """Ranges of documents whose texts have _BATCH_BYTES together, or one longer document by itself."""
    _, offsets = utf8_of(text)
    first = 0
    while first < len(text):
        last = int(np.searchsorted(offsets, offsets[first] + _BATCH_BYTES, "right")) - 1
        last = min(max(last, first + 1), len(text))
        yield first, last
        first = last
