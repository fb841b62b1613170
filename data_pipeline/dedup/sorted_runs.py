"""Rows too many for the memory, written as sorted runs: each run one or more row groups, sorted by its first column.

A reader that wants a range of keys reads of each run only the row groups that can hold them, by their statistics.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

RUN_ROWS = 1 << 21
"""50 MB of rows, and as much again while they are sorted."""
ROW_GROUP_ROWS = 1 << 14
"""A 128th of a full run: so many partitions of the keys read no more than their part."""


class RunWriter:
    """Collects columns until a run is full; hold at most RUN_ROWS rows and one addition in memory."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        """Open the file.

        Args:
            path: where to.
            schema: integer columns; runs are sorted by the first one, rows with equal keys stay in the order added.
        """
        self._schema = schema
        self._writer = pq.ParquetWriter(
            path, schema, compression="zstd", use_dictionary=False, column_encoding=_encodings(schema)
        )
        self._columns: list[tuple[NDArray[Any], ...]] = []
        self._held = 0
        self.rows = 0
        """Rows added so far."""

    def add(self, *columns: NDArray[Any]) -> None:
        """Add rows, given as the columns of the schema, (n,) each."""
        self._columns.append(columns)
        self._held += len(columns[0])
        self.rows += len(columns[0])
        if self._held >= RUN_ROWS:
            self._write_run()

    def _write_run(self) -> None:
        if self._held:
            columns = [np.concatenate(parts) for parts in zip(*self._columns, strict=True)]
            # A stable sort: of the others, which of two equal keys comes first depends on the processor.
            order = np.argsort(columns[0], kind="stable")
            table = pa.table([column[order] for column in columns], schema=self._schema)
            self._writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
        self._columns = []
        self._held = 0

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._write_run()
        self._writer.close()


def _encodings(schema: pa.Schema) -> dict[str, str]:
    # Sorted hashes have no repeats and no small differences, but few different high bytes.
    return dict.fromkeys(schema.names, "DELTA_BINARY_PACKED")
