"""Stage `contamination`: which benchmark items stand in the documents of a job, over all its shards.

contaminated_items.jsonl   one item a line, by task and id: `documents` that share an n-gram with it, `ngrams_hit`, the
                           most of its n-grams that one document has, `share` of all its n-grams that these are, and
                           up to three `doc_ids`
contamination.json         by task: items, matchable, contaminated, dirty_share (of the matchable), common: contaminated
                           items that stand in more than COMMON_DOCUMENTS documents
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.decontamination.index import ITEMS_FILE
from data_pipeline.parquet_reader import open_rows
from data_pipeline.tasks import Counts, Progress

CONTAMINATION_FILE = "contamination.parquet"
ITEMS_LIST_FILE = "contaminated_items.jsonl"
TABLE_FILE = "contamination.json"

COMMON_DOCUMENTS = 10
"""13-grams in more than ten training documents were mostly common phrases and boilerplate, and not overlaps with the
benchmark in particular: such items are counted apart. Source: Brown et al. 2020, appendix C."""

CONTAMINATION_SCHEMA = pa.schema([("doc_id", pa.int64()), ("item", pa.int32()), ("n_hits", pa.int32())])
"""Per shard: one row a document and item, `n_hits` different n-grams of the item in the document."""

_EXAMPLES = 3
_BATCH_ROWS = 1 << 16


def write_contamination(
    folder: Path, hit_files: Sequence[Path], index_folder: Path, progress: Progress | None = None
) -> Counts:
    """Merge the shards' findings. In memory: a few numbers for each item.

    Args:
        folder: where to.
        hit_files: contamination.parquet of every shard.
        index_folder: of stage `benchmarks`.
        progress: called with bytes read, no documents.

    Returns:
        no documents; `detail` is the table by task.
    """
    items = pq.read_table(index_folder / ITEMS_FILE)
    documents = np.zeros(len(items), np.int64)
    most = np.zeros(len(items), np.int32)
    examples: dict[int, list[int]] = {}
    for path in hit_files:
        with open_rows(path) as file:
            for batch in file.iter_batches(_BATCH_ROWS):
                numbers = batch.column("item").to_numpy()
                documents += np.bincount(numbers, minlength=len(items))
                np.maximum.at(most, numbers, batch.column("n_hits").to_numpy())
                _add_examples(examples, numbers, batch.column("doc_id").to_numpy())
        if progress is not None:
            progress(path.stat().st_size, 0)
    rows = items.to_pylist()
    found = [_row(rows[i], documents[i], most[i], examples[i]) for i in np.flatnonzero(documents).tolist()]
    found.sort(key=lambda row: (row["task"], isinstance(row["id"], str), row["id"]))
    (folder / ITEMS_LIST_FILE).write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in found))
    table = _table(rows, found)
    (folder / TABLE_FILE).write_bytes(orjson.dumps(table, option=orjson.OPT_INDENT_2) + b"\n")
    return Counts(0, 0, detail=table)


def _add_examples(examples: dict[int, list[int]], numbers: NDArray[np.int32], doc_ids: NDArray[np.int64]) -> None:
    """Keep the smallest document ids of each item."""
    order = np.lexsort((doc_ids, numbers))
    numbers, doc_ids = numbers[order], doc_ids[order]
    starts = np.flatnonzero(np.append(True, numbers[1:] != numbers[:-1])) if len(numbers) else np.empty(0, np.int64)
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(numbers)], strict=False):
        number = int(numbers[start])
        smallest = doc_ids[start : min(end, start + _EXAMPLES)].tolist()
        examples[number] = heapq.nsmallest(_EXAMPLES, [*examples.get(number, []), *smallest])


def _row(item: dict[str, Any], documents: int, ngrams_hit: int, doc_ids: list[int]) -> dict[str, Any]:
    return {
        "task": item["task"],
        "id": orjson.loads(item["id"]),
        "how": item["how"],
        "documents": int(documents),
        "ngrams_hit": int(ngrams_hit),
        "share": round(int(ngrams_hit) / item["n_ngrams"], 4),
        "doc_ids": doc_ids,
    }


def _table(items: list[dict[str, Any]], found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {
        task: {"items": 0, "matchable": 0, "contaminated": 0, "common": 0, "dirty_share": None}
        for task in sorted({item["task"] for item in items})
    }
    for item in items:
        table[item["task"]]["items"] += 1
        table[item["task"]]["matchable"] += item["n_ngrams"] > 0
    for row in found:
        table[row["task"]]["contaminated"] += 1
        table[row["task"]]["common"] += row["documents"] > COMMON_DOCUMENTS
    for counts in table.values():
        if counts["matchable"]:
            counts["dirty_share"] = round(counts["contaminated"] / counts["matchable"], 6)
    return table
