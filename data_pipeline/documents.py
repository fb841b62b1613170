"""Stage `documents`: the documents that stay, without the passages that go. The tokenizer and encoding read only this.

    docs.parquet            as in the stages before; meta gains `cluster` and `cluster_size` where copies were removed,
                            and with the action `report` `contaminated`, the number of benchmark items met
    hashes.parquet          doc_id, hash_high, hash_low (xxh3_128 of the final text, normalised), text_bytes, source
    contamination.parquet   doc_id, item, n_hits; only with decontamination, of the documents that go too

The hash is that of the text as it is written here: two documents whose texts end up equal have equal hashes, so a split
by hash never has them on both sides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_pipeline.decontamination.apply import Action, decontaminate
from data_pipeline.decontamination.contaminated import CONTAMINATION_SCHEMA
from data_pipeline.decontamination.match import Index
from data_pipeline.dedup.clusters import read_clusters
from data_pipeline.dedup.cutting import cut
from data_pipeline.dedup.first_occurrence import REPEATS_SCHEMA
from data_pipeline.dedup.minhash import Signer
from data_pipeline.dedup.signatures import utf8_of
from data_pipeline.dedup.spans import Columns, RowReader, sort_rows, unite
from data_pipeline.dedup.text_batches import doc_id_range
from data_pipeline.histogram import in_order, size_classes
from data_pipeline.parquet_reader import open_rows
from data_pipeline.parquet_writer import DOCUMENT_SCHEMA, BoundedWriter
from data_pipeline.tasks import Counts, Progress
from megagpt.errors import DataError

DOCUMENTS_FILE = "docs.parquet"
HASHES_FILE = "hashes.parquet"
CONTAMINATION_FILE = "contamination.parquet"
HASHES_SCHEMA = pa.schema(
    [
        ("doc_id", pa.int64()),
        ("hash_high", pa.uint64()),
        ("hash_low", pa.uint64()),
        ("text_bytes", pa.int64()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
    ]
)
REASON_EMPTY = "empty_after_cutting"

_SIGNATURES_SCHEMA = pa.schema([("doc_id", pa.int64()), ("hash_high", pa.uint64()), ("hash_low", pa.uint64())])
_HASHES_GROUP_ROWS = 1 << 16
_LOW_64 = (1 << 64) - 1
_KEPT = ""
_WORD = re.compile(r"\w")

Decontamination = tuple[Path, Action, int]
"""Folder of the index, what to do, characters on each side that go with a passage."""


@dataclass
class _Group:
    """The documents of one row group, and what was decided about them; one entry a row in each."""

    table: pa.Table
    reasons: NDArray[np.object_]
    """Why it goes; empty where it stays."""
    texts: dict[int, str] = field(default_factory=dict)
    """Row -> its text, where it is no longer the one in the table."""
    meta: dict[int, dict[str, int]] = field(default_factory=dict)
    """Row -> what its meta gains."""

    @property
    def doc_ids(self) -> NDArray[np.int64]:
        return np.asarray(self.table.column("doc_id").to_numpy(), np.int64)

    def stays(self) -> NDArray[np.bool_]:
        return np.asarray(self.reasons == _KEPT, np.bool_)


def write_documents(
    folder: Path,
    documents: Path,
    clusters: Path | None,
    signatures: Path,
    spans: Mapping[str, Sequence[Path]],
    decontamination: Decontamination | None,
    progress: Progress | None = None,
) -> Counts:
    """Write the documents of one shard that stay. In memory: a row group of documents, and one of each file of spans.

    Args:
        folder: where to.
        documents: docs.parquet of the shard, from the filters.
        clusters: clusters.parquet of the job; None without document dedup.
        signatures: signatures.parquet of the shard.
        spans: kind, for the counts -> files with rows (doc_id, start, end), characters of the texts in `documents`.
        decontamination: None: none.
        progress: called with bytes of text and documents.

    Raises:
        DataError: the signatures or spans are not those of these documents.
    """
    first_doc_id, last_doc_id = doc_id_range(documents) or (0, -1)
    members = None if clusters is None else read_clusters(clusters, first_doc_id, last_doc_id)
    cutter = _Cutter(spans, first_doc_id)
    hashes = RowReader([signatures], _SIGNATURES_SCHEMA, first_doc_id)
    with ExitStack() as stack:
        outputs = _Outputs(folder, stack)
        cleaner = None if decontamination is None else _Decontaminator(folder, stack, decontamination)
        file = stack.enter_context(open_rows(documents))
        for number in range(file.num_row_groups):
            table = file.read_row_group(number, columns=DOCUMENT_SCHEMA.names).combine_chunks()
            if not len(table):
                continue
            group = _Group(table, np.full(len(table), _KEPT, object))
            if members is not None:
                _mark_members(group, members)
            cutter.cut(group)
            if cleaner is not None:
                cleaner.clean(group)
            outputs.write(group, _known_hashes(hashes, group.doc_ids, documents))
            if progress is not None:
                progress(table.column("text").nbytes, len(table))
    contamination = {} if cleaner is None else cleaner.detail()
    return outputs.counts({**cutter.detail(), **contamination})


def _mark_members(group: _Group, members: pa.Table) -> None:
    """Removed documents get their reason; of those that stay although copies went, meta tells the cluster."""
    doc_ids = group.doc_ids
    first, last = np.searchsorted(members.column("doc_id").to_numpy(), [doc_ids[0], doc_ids[-1] + 1])
    rows = members.slice(first, last - first)
    at = np.searchsorted(doc_ids, rows.column("doc_id").to_numpy())
    kept = rows.column("kept").to_numpy()
    group.reasons[at[~kept]] = rows.column("reason").to_numpy()[~kept]
    clusters, sizes = rows.column("cluster").to_pylist(), rows.column("cluster_size").to_pylist()
    for i in np.flatnonzero(kept).tolist():
        group.meta[int(at[i])] = {"cluster": clusters[i], "cluster_size": sizes[i]}


def _known_hashes(reader: RowReader, doc_ids: NDArray[np.int64], documents: Path) -> Columns:
    rows = reader.up_to(int(doc_ids[-1]))
    if not np.array_equal(rows["doc_id"], doc_ids):
        raise DataError(
            f"{documents}: documents from id {doc_ids[0]} on are not those of its signatures; run the job again"
        )
    return rows


class _Cutter:
    """Cuts spans of several kinds, and counts by kind what each alone would have cut."""

    def __init__(self, spans: Mapping[str, Sequence[Path]], first_doc_id: int) -> None:
        self._readers = {kind: RowReader(paths, REPEATS_SCHEMA, first_doc_id) for kind, paths in spans.items()}
        self._characters: Counter[str] = Counter()
        self._documents: Counter[str] = Counter()

    def cut(self, group: _Group) -> None:
        parts = []
        for kind, reader in self._readers.items():
            rows = unite(sort_rows(reader.up_to(int(group.doc_ids[-1])), "doc_id", "start"))
            self._characters[kind] += int((rows["end"] - rows["start"]).sum(dtype=np.int64))
            self._documents[kind] += len(np.unique(rows["doc_id"]))
            parts.append(rows)
        if not any(len(rows["doc_id"]) for rows in parts):
            return
        joined = {name: np.concatenate([rows[name] for rows in parts]) for name in REPEATS_SCHEMA.names}
        rows = unite(sort_rows(joined, "doc_id", "start"))
        doc_ids, firsts = np.unique(rows["doc_id"], return_index=True)
        at = np.searchsorted(group.doc_ids, doc_ids)
        if at[-1] == len(group.doc_ids) or not (group.stays()[at] & (group.doc_ids[at] == doc_ids)).all():
            raise DataError(
                f"the passages to cut from {doc_ids[0]} on are not those of these documents; run the job again"
            )
        text = group.table.column("text")
        spans = np.column_stack([rows["start"], rows["end"]])
        for row, spans_of_row in zip(at.tolist(), np.split(spans, firsts[1:]), strict=True):
            left = cut(text[row].as_py(), spans_of_row.tolist())
            group.texts[row] = left
            if not _WORD.search(left):
                group.reasons[row] = REASON_EMPTY

    def detail(self) -> dict[str, Any]:
        return {"characters_cut": dict(self._characters), "documents_cut": dict(self._documents)}


class _Decontaminator:
    """Looks for benchmark items in the texts as they are after cutting."""

    def __init__(self, folder: Path, stack: ExitStack, settings: Decontamination) -> None:
        index_folder, self._action, self._excise_characters = settings
        self._index = Index.open(index_folder)
        self._writer = stack.enter_context(
            BoundedWriter(folder / CONTAMINATION_FILE, CONTAMINATION_SCHEMA, _HASHES_GROUP_ROWS)
        )
        self._documents = self._characters = 0

    def clean(self, group: _Group) -> None:
        doc_ids = group.doc_ids
        text = group.table.column("text")
        for row in np.flatnonzero(group.stays()).tolist():
            before = group.texts.get(row)
            outcome = decontaminate(
                text[row].as_py() if before is None else before, self._index, self._action, self._excise_characters
            )
            if not outcome.hits:
                continue
            self._documents += 1
            self._characters += outcome.characters_cut
            for item, n_hits in outcome.items:
                self._writer.add({"doc_id": int(doc_ids[row]), "item": item, "n_hits": n_hits}, 0)
            if outcome.text is None:
                group.reasons[row] = outcome.reason
            elif self._action == "report":
                group.meta.setdefault(row, {})["contaminated"] = len(outcome.items)
            else:
                group.texts[row] = outcome.text

    def detail(self) -> dict[str, Any]:
        return {
            "contaminated_documents": self._documents,
            "decontamination_action": self._action,
            "characters_excised": self._characters,
        }


class _Outputs:
    """docs.parquet and hashes.parquet, and the account of the documents."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._documents = stack.enter_context(BoundedWriter(folder / DOCUMENTS_FILE, DOCUMENT_SCHEMA))
        self._hashes = stack.enter_context(BoundedWriter(folder / HASHES_FILE, HASHES_SCHEMA, _HASHES_GROUP_ROWS))
        self._sources: dict[str, Counter[str]] = {}
        self._lengths: Counter[str] = Counter()
        self._text_bytes = 0

    def write(self, group: _Group, known: Columns) -> None:
        """Write what stays of the group; `known` are the hashes of its texts as they were."""
        self._count(group)
        stays = group.stays()
        rows = np.flatnonzero(stays)
        texts = {i: group.texts[row] for i, row in enumerate(rows.tolist()) if row in group.texts}
        table = group.table if stays.all() else group.table.filter(pa.array(stays)).combine_chunks()
        table = _with_values(table, "text", texts)
        meta = table.column("meta")
        gains = {i: group.meta[row] for i, row in enumerate(rows.tolist()) if row in group.meta}
        table = _with_values(table, "meta", {i: _with_gain(meta[i].as_py(), gain) for i, gain in gains.items()})
        text = table.column("text")
        text_bytes = pc.binary_length(text).to_numpy().astype(np.int64)
        high, low = known["hash_high"][stays], known["hash_low"][stays]
        high[list(texts)], low[list(texts)] = _content_hashes(list(texts.values()))
        hashes = [
            table.column("doc_id"),
            high,
            low,
            text_bytes,
            table.column("source").cast(HASHES_SCHEMA.field(4).type),
        ]
        self._documents.add_table(table.cast(DOCUMENT_SCHEMA), int(text_bytes.sum()))
        self._hashes.add_table(pa.table(hashes, schema=HASHES_SCHEMA), 0)
        self._text_bytes += int(text_bytes.sum())
        self._lengths.update(size_classes(pc.utf8_length(text).to_pylist()))

    def _count(self, group: _Group) -> None:
        sources = group.table.column("source").to_pylist()
        for (source, reason), n in Counter(zip(sources, group.reasons.tolist(), strict=True)).items():
            self._sources.setdefault(source, Counter())[reason] += n

    def counts(self, detail: Mapping[str, Any]) -> Counts:
        reasons: Counter[str] = Counter()
        for counter in self._sources.values():
            reasons.update(counter)
        kept = reasons.pop(_KEPT, 0)
        return Counts(
            kept + reasons.total(),
            kept,
            dict(sorted(reasons.items())),
            {
                "text_bytes": self._text_bytes,
                "sources": {source: dict(counter) for source, counter in self._sources.items()},
                "length_histogram": in_order(self._lengths),
                **detail,
            },
        )


def _with_values(table: pa.Table, name: str, values: Mapping[int, str]) -> pa.Table:
    """The table with other values of a column in some rows, given in rising order."""
    if not values:
        return table
    mask = np.zeros(len(table), np.bool_)
    mask[list(values)] = True
    column = table.column(name).combine_chunks()
    replaced = pc.replace_with_mask(column, pa.array(mask), pa.array(list(values.values()), column.type))
    return table.set_column(table.schema.get_field_index(name), name, replaced)


def _with_gain(meta: str, gain: Mapping[str, int]) -> str:
    return orjson.dumps({**orjson.loads(meta), **gain}, option=orjson.OPT_SORT_KEYS).decode()


def _content_hashes(texts: list[str]) -> tuple[list[int], list[int]]:
    """The upper and lower halves of the hashes of texts."""
    if not texts:
        return [], []
    hashes = Signer(None).sign(*utf8_of(pa.array(texts, pa.string()))).content_hashes
    return [h >> 64 for h in hashes], [h & _LOW_64 for h in hashes]
