"""Data sets of the Hugging Face hub, or of a local folder, through `datasets`, as a stream."""

from __future__ import annotations

from data_pipeline.config import Source
from data_pipeline.document import Damage, Shard
from data_pipeline.sources.record import RawRecord, Records, scalar_meta
from megagpt.errors import DataError


def read_hub(shard: Shard, source: Source) -> Records:
    """One record a row of `source.split`, in the data set's order.

    Raises:
        DataError: the data set or split cannot be loaded, or has no column `source.text_key`.
    """
    import datasets  # here and not above: it may load torch, which data preparation otherwise never does

    where = f"{shard.path} (split {source.split!r})"
    try:
        rows = datasets.load_dataset(shard.path, split=source.split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{where}: cannot be loaded by `datasets`: {error}") from None
    for ordinal, row in enumerate(rows):
        if source.text_key not in row:
            raise DataError(f"{where}: no column {source.text_key!r}; columns are {', '.join(row)}")
        text = row[source.text_key]
        if not isinstance(text, str):
            yield Damage(shard.path, ordinal, "hub.text_not_a_string", unit="row")
            continue
        url = row.get("url") or f"{shard.path}:{source.split}:{ordinal}"
        yield RawRecord(ordinal, str(url), text=text, meta=scalar_meta(row.get("meta")))
