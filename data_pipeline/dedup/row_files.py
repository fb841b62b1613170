"""Parquet files of plain columns: written in row groups of equal size, whatever the batches that come in."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP = 1 << 17

# Hashes do not compress; trying costs more time than everything else.
_HASHES = {"hash_high", "hash_low", "band_key"}


class RowsWriter:
    """Appends tables; the file is complete when the `with` block ends."""

    def __init__(self, path: Path, schema: pa.Schema, row_group: int = ROW_GROUP) -> None:
        compression = {name: "none" if name in _HASHES else "zstd" for name in schema.names}
        words = [field.name for field in schema if pa.types.is_string(field.type)]
        self._writer = pq.ParquetWriter(path, schema, compression=compression, use_dictionary=words)
        self._schema = schema
        self._row_group = row_group
        self._tables: list[pa.Table] = []
        self._n_waiting = 0
        self.n_rows = 0

    def write(self, table: pa.Table) -> None:
        """Add rows."""
        self._tables.append(table)
        self._n_waiting += table.num_rows
        self.n_rows += table.num_rows
        if self._n_waiting >= self._row_group:
            rows = pa.concat_tables(self._tables)
            n_full = rows.num_rows - rows.num_rows % self._row_group
            self._writer.write_table(rows.slice(0, n_full), row_group_size=self._row_group)
            rest = rows.slice(n_full)
            self._tables, self._n_waiting = [rest], rest.num_rows

    def end_group(self) -> None:
        """Write what waits, so that no row group holds rows of before and after."""
        if self._n_waiting:
            self._writer.write_table(pa.concat_tables(self._tables), row_group_size=self._row_group)
        self._tables, self._n_waiting = [], 0

    def __enter__(self) -> RowsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.end_group()
        self._writer.close()
