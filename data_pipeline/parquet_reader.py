"""Reading parquet files of any size in bounded memory."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq


def open_rows(path: Path) -> pq.ParquetFile:
    """Open a parquet file to be read batch by batch.

    By default pyarrow reads ahead and keeps the bytes of all row groups that a loop goes through until it ends.
    """
    return pq.ParquetFile(path, pre_buffer=False)
