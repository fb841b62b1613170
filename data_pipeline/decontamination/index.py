"""Stage `benchmarks`: the n-grams of benchmark items, as sorted arrays that every worker maps.

    hashes.npy, offsets.npy, item_numbers.npy, bloom.npy   the n-grams, see ngram_table.py
    items.parquet                                          task, id (JSON), how, n_words, n_ngrams
    index.json                                             lengths of the n-grams, and counts

Which n-grams of an item count says megagpt/text/ngrams.py. Those that more than MAX_ITEMS items of a task share are
left out and counted; an item of nothing else is listed as not matchable, as one that is too short.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.decontamination.items import Item, item_files, read_items
from data_pipeline.decontamination.ngram_table import NgramTable
from data_pipeline.tasks import Counts, Progress
from megagpt.errors import DataError
from megagpt.text.ngrams import LEAST_WORDS, item_ngrams

ITEMS_FILE, INDEX_FILE = "items.parquet", "index.json"
FORMAT = 1

_LISTED_IDS = 20

ITEMS_SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("id", pa.string()),
        ("how", pa.string()),
        ("n_words", pa.int32()),
        ("n_ngrams", pa.int32()),
    ]
)


def write_index(folder: Path, items: tuple[Path, ...], ngram: int, progress: Progress | None = None) -> Counts:
    """Write the index of all items. In memory: a few hundred bytes an item, and a part of the n-grams.

    Args:
        folder: where to.
        items: jsonl files, or folders of them.
        ngram: words of an overlap that counts.
        progress: called with bytes read, no documents.

    Returns:
        no documents; in `detail` the numbers of items, by task and by how they are matched, and of n-grams.

    Raises:
        DataError: a line that is no item, or two items of one task and id.
    """
    if ngram < LEAST_WORDS:
        raise DataError(f"decontamination.ngram is {ngram}; fewer than {LEAST_WORDS} words are ordinary language")
    rows: dict[str, list[Any]] = {name: [] for name in ITEMS_SCHEMA.names}
    tasks: dict[str, int] = {}
    lengths: set[int] = set()
    with tempfile.TemporaryDirectory(dir=folder) as spool:
        table = NgramTable(Path(spool))
        for number, item in enumerate(_all_items(items, progress)):
            found = item_ngrams(item.texts, ngram)
            lengths |= found.lengths
            table.add(found.hashes, number)
            tasks.setdefault(item.task, len(tasks))
            for name, value in zip(
                rows, (item.task, orjson.dumps(item.id).decode(), found.how, found.n_words, 0), strict=True
            ):
                rows[name].append(value)
        task_of_item = np.array([tasks[task] for task in rows["task"]], np.int32)
        kept, n_unique, n_left_out = table.write(folder, task_of_item)
    rows["n_ngrams"] = kept.tolist()
    rows["how"] = ["shared" if not n and how != "too short" else how for how, n in zip(rows["how"], kept, strict=True)]
    pq.write_table(pa.table(rows, schema=ITEMS_SCHEMA), folder / ITEMS_FILE, compression="zstd")
    detail = {
        **_summary(rows),
        "ngrams": n_unique,
        "ngrams_shared_by_many_items": n_left_out,
    }
    content = {"format": FORMAT, "lengths": sorted(lengths), **detail}
    (folder / INDEX_FILE).write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")
    return Counts(0, 0, detail=detail)


def _all_items(items: tuple[Path, ...], progress: Progress | None) -> Iterator[Item]:
    known: dict[tuple[str, int | str], Path] = {}
    for file in item_files(items):
        for item in read_items(file):
            key = (item.task, item.id)
            if key in known:
                raise DataError(
                    f"{file}: task {item.task} has an item {item.id!r} already, in {known[key]}; name each item once "
                    "(of files without `task`, the file's name stands for it)"
                )
            known[key] = file
            yield item
        if progress is not None:
            progress(file.stat().st_size, 0)


def _summary(rows: dict[str, list[Any]]) -> dict[str, Any]:
    """Items by task and by how they are matched; which ones cannot be."""
    lost: dict[str, list[Any]] = {}
    by_task: dict[str, Counter[str]] = {}
    for task, name, how, n_ngrams in zip(rows["task"], rows["id"], rows["how"], rows["n_ngrams"], strict=True):
        by_task.setdefault(task, Counter())[how] += 1
        if not n_ngrams:
            lost.setdefault(task, []).append(orjson.loads(name))
    return {
        "items": len(rows["task"]),
        "not_matchable": sum(len(ids) for ids in lost.values()),
        "by_task": {task: dict(sorted(counts.items())) for task, counts in sorted(by_task.items())},
        "not_matchable_ids": {task: ids[:_LISTED_IDS] for task, ids in sorted(lost.items())},
    }
