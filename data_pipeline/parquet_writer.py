"""A parquet file written row group by row group, in bounded memory, and published whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

DOCUMENT_SCHEMA = pa.schema(
    [
        ("doc_id", pa.int64()),
        ("text", pa.string()),
        ("source", pa.string()),
        ("url", pa.string()),
        ("meta", pa.string()),
    ]
)
REJECT_SCHEMA = pa.schema(
    [
        ("doc_id", pa.int64()),
        ("url", pa.string()),
        ("reason", pa.string()),
        ("failed", pa.string()),
        ("text", pa.string()),
    ]
)
GROUP_ROWS = 4096
GROUP_CHARACTERS = 16 * 2**20
"""A row group is closed at so many rows or characters of text, whichever comes first."""


class BoundedWriter:
    """Collects rows into row groups; the file appears under its name when the `with` block ends without an error."""

    def __init__(self, path: Path, schema: pa.Schema, group_rows: int = GROUP_ROWS) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._schema = schema
        self._group_rows = group_rows
        # Texts and ids do not repeat: to look for repeats takes a quarter of the time of writing them.
        repeating = [name for name in schema.names if name not in ("text", "doc_id")]
        self._writer = pq.ParquetWriter(self._temporary, schema, compression="zstd", use_dictionary=repeating)
        self._tables: list[pa.Table] = []
        self._rows: list[dict[str, Any]] = []
        self._held = 0
        self._characters = 0

    def add(self, row: dict[str, Any], characters: int) -> None:
        """Add one row of about so many characters; dictionaries in it are written as JSON."""
        self._rows.append(row)
        self._count(1, characters)

    def add_table(self, table: pa.Table, characters: int) -> None:
        """Add the rows of a table of the file's schema, of about so many characters together."""
        self._tables += [self._table_of_rows(), table]
        self._count(len(table), characters)

    def _count(self, rows: int, characters: int) -> None:
        self._held += rows
        self._characters += characters
        if self._held >= self._group_rows or self._characters >= GROUP_CHARACTERS:
            self._flush()

    def _table_of_rows(self) -> pa.Table:
        rows, self._rows = self._rows, []
        columns = [pa.array([_value(row[field.name]) for row in rows], field.type) for field in self._schema]
        return pa.Table.from_arrays(columns, schema=self._schema)

    def _flush(self) -> None:
        if self._held:
            self._writer.write_table(pa.concat_tables([*self._tables, self._table_of_rows()]))
        self._tables = []
        self._held = 0
        self._characters = 0

    def __enter__(self) -> BoundedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._writer.close()
            self._temporary.unlink()
            return
        self._flush()
        self._writer.close()
        with self._temporary.open("rb") as file:
            os.fsync(file.fileno())
        self._temporary.replace(self._path)


def _value(value: Any) -> Any:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS) if isinstance(value, dict) else value
