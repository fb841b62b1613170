"""The `filter` stage: documents of a shard -> those that pass every rule, and what was measured of all.

docs.parquet        documents that pass
rejects.parquet     of the others the first of each reason
decisions.parquet   every document: doc_id, reason (empty: passes), all failed rules, and each measure as a column
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.config import DataJob, LanguageSection, Source
from data_pipeline.document import Document, Shard
from data_pipeline.filters.registry import FilterChain, build_filters
from data_pipeline.filters.url_filter import UrlBlocklist
from data_pipeline.histogram import in_order, size_class
from data_pipeline.intake import Account, DocumentFiles, read_documents
from data_pipeline.language import LanguageModel
from data_pipeline.parquet_reader import open_rows
from data_pipeline.sources.record import RawRecord
from data_pipeline.tasks import Counts, Progress

DECISIONS_FILE = "decisions.parquet"

_BATCH_ROWS = 512
_DECISION_ROWS = 16_384


def filter_documents(
    folder: Path,
    shard: Shard,
    source: Source,
    job: DataJob,
    extracted: Path | None = None,
    blocklist: Path | None = None,
    progress: Progress | None = None,
) -> Counts:
    """Write a shard's documents that pass; the same input gives the same bytes.

    Args:
        folder: where to.
        shard: what to read, unless it was extracted.
        source: the source it belongs to.
        job: language and filter settings.
        extracted: docs.parquet of the `extract` stage, for shards of pages.
        blocklist: folder of the compiled URL lists, for shards that were not extracted.
        progress: called with bytes and documents.

    Raises:
        DataError: the shard cannot be opened, lacks its text column, or a model or word list is missing.
    """
    rules = _Rules(job)
    account = Account()
    urls = UrlBlocklist.open(blocklist) if blocklist is not None and extracted is None else None
    documents = (
        read_documents(shard, source, urls, lambda raw: _own_text(raw, shard), account, progress)
        if extracted is None
        else _read_extracted(extracted, account, progress)
    )
    lengths: Counter[str] = Counter()
    with DocumentFiles(folder, account) as files, DecisionFile(folder, rules.chain.measure_names) as decisions:
        for document, no_text in documents:
            reason = no_text or rules.decide(document)
            files.add(document, reason)
            if not no_text:
                decisions.add(document, reason)
                lengths[size_class(len(document.text))] += 1
    return account.counts(
        failed_rules=dict(rules.failed_rules),
        languages=dict(rules.languages),
        kept_by_language=dict(rules.kept_by_language),
        thresholds=rules.thresholds(),
        lengths=in_order(lengths),
    )


class _Rules:
    """Language and filters, loaded once a shard, with a count of what they said."""

    def __init__(self, job: DataJob) -> None:
        self.language: LanguageSection = job.language
        self.model = LanguageModel(job.language.model) if job.language.enabled else None
        self.chain: FilterChain = build_filters(job.filters)
        self.languages: Counter[str] = Counter()
        self.kept_by_language: Counter[str] = Counter()
        self.failed_rules: Counter[str] = Counter()

    def thresholds(self) -> dict[str, dict[str, Any]]:
        language = {"keep": self.language.keep, "min_score": self.language.min_score}
        return {**({"language": language} if self.model else {}), **self.chain.thresholds}

    def decide(self, document: Document) -> str:
        """The first rule that the document fails, or nothing; fills in its language, measures and text."""
        reason = self._language_reason(document)
        if reason:
            document.failed.append(reason)
        else:
            self.chain.apply(document)
            reason = document.failed[0] if document.failed else ""
            if not reason and not document.text.strip():
                reason = "no_text_after_filters"
        self.failed_rules.update(document.failed)
        if not reason and self.model is not None:
            self.kept_by_language[document.meta["language"]] += 1
        return reason

    def _language_reason(self, document: Document) -> str:
        if self.model is None:
            return ""
        code, score = self.model.identify(document.text)
        document.meta["language"] = code
        document.meta["language_score"] = f"{score:.4f}"
        self.languages[code] += 1
        if self.language.keep and code not in self.language.keep:
            return "language.not_kept"
        return "language.low_score" if score < self.language.min_score else ""


def decision_schema(measure_names: tuple[str, ...]) -> pa.Schema:
    """Columns of decisions.parquet."""
    return pa.schema(
        [
            ("doc_id", pa.int64()),
            ("reason", pa.string()),
            ("failed", pa.list_(pa.string())),
            *((name, pa.float32()) for name in measure_names),
        ]
    )


class DecisionFile:
    """decisions.parquet, column by column in bounded memory; a context manager."""

    def __init__(self, folder: Path, measure_names: tuple[str, ...]) -> None:
        self._names = measure_names
        self._schema = decision_schema(measure_names)
        self._writer = pq.ParquetWriter(folder / DECISIONS_FILE, self._schema, compression="zstd")
        self._rows: list[tuple[Any, ...]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._flush()
        self._writer.close()

    def add(self, document: Document, reason: str) -> None:
        """One document; measures that were not reached are null."""
        measures = document.measures
        self._rows.append((document.doc_id, reason, document.failed, *map(measures.get, self._names)))
        if len(self._rows) >= _DECISION_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            by_column = zip(zip(*self._rows, strict=True), self._schema, strict=True)
            columns = [pa.array(values, field.type) for values, field in by_column]
            self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
            self._rows.clear()


def _own_text(raw: RawRecord, shard: Shard) -> tuple[str, str]:
    if raw.text is None:
        raise TypeError(f"{shard.path}: a page reached the filter stage without having been extracted")
    return raw.text, ""


def _read_extracted(path: Path, account: Account, progress: Progress | None) -> Iterator[tuple[Document, str]]:
    with open_rows(path) as file:
        for batch in file.iter_batches(_BATCH_ROWS):
            n_bytes = 0
            for row in batch.to_pylist():
                document = Document(row["doc_id"], row["text"], row["source"], row["url"], orjson.loads(row["meta"]))
                n_bytes += len(document.text.encode())
                yield document, ""
            account.text_bytes_in += n_bytes
            if progress is not None:
                progress(n_bytes, len(batch))
