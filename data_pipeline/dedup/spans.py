"""Passages of documents as rows (doc_id, start, end): uniting them, and reading them along with the documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.parquet_reader import open_rows

Columns = dict[str, NDArray[Any]]


def unite(spans: Mapping[str, NDArray[Any]]) -> Columns:
    """Join spans of a document that overlap or touch.

    Args:
        spans: doc_id, start and end, (n,) each, in order of (doc_id, start).

    Returns:
        the same columns, (m,) each.
    """
    doc_ids, starts, ends = spans["doc_id"], spans["start"], spans["end"]
    if not len(doc_ids):
        return dict(spans)
    new_document = np.concatenate([[True], doc_ids[1:] != doc_ids[:-1]])
    # One running maximum over all documents: a later document's ends are larger than all of an earlier one's.
    rank = np.cumsum(new_document) << 32
    reach = np.maximum.accumulate(rank + ends)
    opens = np.concatenate([[True], rank[1:] + starts[1:] > reach[:-1]])
    closes = np.concatenate([opens[1:], [True]])
    return {
        "doc_id": doc_ids[opens],
        "start": starts[opens],
        "end": (reach[closes] - rank[closes]).astype(ends.dtype),
    }


def sort_rows(rows: Mapping[str, NDArray[Any]], *keys: str) -> Columns:
    """Columns of equal length in the order of the keys, the first one counting most."""
    order = np.lexsort([rows[key] for key in reversed(keys)])
    return {name: column[order] for name, column in rows.items()}


class RowReader:
    """Reads files in rising order of doc_id side by side with the documents, a row group of each at a time."""

    def __init__(self, paths: Sequence[Path], schema: pa.Schema, first_doc_id: int) -> None:
        """Open the files at the rows of the first document.

        Args:
            paths: parquet files, each sorted by doc_id.
            schema: the columns to read, doc_id among them.
            first_doc_id: the reading starts here.
        """
        self._files = [_OneFile(path, schema, first_doc_id) for path in paths]
        self._schema = schema

    def up_to(self, last_doc_id: int) -> Columns:
        """The next rows, with doc_id up to and with `last_doc_id`; file after file, so not sorted over all of them."""
        parts = [part for file in self._files for part in file.up_to(last_doc_id)]
        empty = {field.name: np.empty(0, field.type.to_pandas_dtype()) for field in self._schema}
        return {name: np.concatenate([empty[name], *(part[name] for part in parts)]) for name in self._schema.names}


class _OneFile:
    def __init__(self, path: Path, schema: pa.Schema, first_doc_id: int) -> None:
        self._path = path
        self._names = schema.names
        metadata = pq.read_metadata(path)
        column = metadata.schema.to_arrow_schema().get_field_index("doc_id")
        groups = [(i, metadata.row_group(i).column(column)) for i in range(metadata.num_row_groups)]
        bounds = [(i, c.statistics.min, c.statistics.max) for i, c in groups if c.num_values]
        self._groups = [(i, low) for i, low, high in bounds if high >= first_doc_id][::-1]
        self._first_doc_id = first_doc_id
        self._held: Columns | None = None

    def up_to(self, last_doc_id: int) -> list[Columns]:
        parts = []
        while self._held is not None or (self._groups and self._groups[-1][1] <= last_doc_id):
            rows = self._held if self._held is not None else self._read(self._groups.pop()[0])
            n = int(np.searchsorted(rows["doc_id"], last_doc_id, "right"))
            parts.append({name: column[:n] for name, column in rows.items()})
            self._held = None
            if n < len(rows["doc_id"]):
                self._held = {name: column[n:] for name, column in rows.items()}
                break
        return parts

    def _read(self, group: int) -> Columns:
        # Opened for each row group: a job has more files of spans than a process may keep open.
        with open_rows(self._path) as file:
            table = file.read_row_group(group, columns=self._names)
        rows = {name: table.column(name).to_numpy() for name in self._names}
        n = int(np.searchsorted(rows["doc_id"], self._first_doc_id))
        return {name: column[n:] for name, column in rows.items()}
