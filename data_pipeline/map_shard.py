"""The map task: one shard's records, extracted, identified, filtered, and written.

out/docs.parquet       kept documents: doc_id, text, source, url, meta (JSON)
out/rejects.parquet    of the others the first of each reason: doc_id, url, reason, failed rules, start of the text
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipeline.config import DataJob, LanguageSection, Source
from data_pipeline.document import Damage, Document, Shard, ShardCounts
from data_pipeline.extract.html import extract_html
from data_pipeline.filters.registry import FilterChain, build_filters
from data_pipeline.language import LanguageModel
from data_pipeline.parquet_writer import DOCUMENT_SCHEMA, REJECT_SCHEMA, BoundedWriter
from data_pipeline.sources.record import RawRecord
from data_pipeline.sources.shards import read_shard

REJECT_SAMPLE = 200
"""Rejected documents kept for a person to look at, a reason."""
REJECT_CHARACTERS = 500
DAMAGE_SAMPLE = 1000
"""Damages listed one by one, a shard; all are counted."""


def map_shard(
    shard: Shard,
    source: Source,
    job: DataJob,
    out: Path,
    progress: Callable[[int], None] | None = None,
) -> ShardCounts:
    """Write a shard's kept documents and a sample of its rejects; the same input gives the same bytes.

    Args:
        shard: what to read.
        source: the source it belongs to.
        job: language and filter settings.
        out: folder for the two files, made if absent; each is there whole or not at all.
        progress: called now and then with the bytes of the file read since the last call.

    Returns:
        Counts with records = kept + the sum of rejected. A damaged line or row is one rejected record; how many
        records a damaged stretch of bytes held nobody can know, so it is counted as damage only.

    Raises:
        DataError: the shard cannot be opened, lacks its text column, or there is no language model.
    """
    stages = _Stages(job)
    counts = ShardCounts(thresholds=stages.thresholds())
    out.mkdir(parents=True, exist_ok=True)
    sampled: Counter[str] = Counter()
    with (
        BoundedWriter(out / "docs.parquet", DOCUMENT_SCHEMA) as kept,
        BoundedWriter(out / "rejects.parquet", REJECT_SCHEMA) as rejects,
    ):
        for document, reason in _decide(shard, source, stages, counts, progress):
            if not reason:
                kept.add(document_row(document), len(document.text))
            elif sampled[reason] < REJECT_SAMPLE:
                sampled[reason] += 1
                rejects.add(_reject_row(document, reason), REJECT_CHARACTERS)
    return counts


class _Stages:
    """What a document goes through, loaded once a shard."""

    def __init__(self, job: DataJob) -> None:
        self.language: LanguageSection = job.language
        self.model = LanguageModel(job.language.model)
        self.filters: FilterChain = build_filters(job.filters)

    def thresholds(self) -> dict[str, dict[str, object]]:
        language = {"keep": self.language.keep, "min_score": self.language.min_score}
        return {"language": language, **self.filters.thresholds}

    def text_of(self, raw: RawRecord) -> str:
        return raw.text if raw.text is not None else extract_html(raw.html, raw.charset)

    def check_language(self, document: Document) -> str:
        """The reason why the document's language speaks against it, or nothing; notes the language in meta."""
        code, score = self.model.identify(document.text)
        document.meta["language"] = code
        document.meta["language_score"] = f"{score:.4f}"
        if self.language.keep and code not in self.language.keep:
            return "language.not_kept"
        return "language.low_score" if score < self.language.min_score else ""


def _decide(
    shard: Shard,
    source: Source,
    stages: _Stages,
    counts: ShardCounts,
    progress: Callable[[int], None] | None,
) -> Iterator[tuple[Document, str]]:
    """Every record with the reason for its rejection, empty where it is kept; counts as it goes."""
    position = 0
    for raw in read_shard(shard, source):
        if isinstance(raw, Damage):
            _count_damage(raw, counts)
            continue
        if progress is not None and raw.position > position:
            progress(raw.position - position)
            position = raw.position
        document = Document(
            doc_id=shard.ordinal << 32 | raw.ordinal,
            text="",
            source=shard.source,
            url=raw.url,
            meta=raw.meta,
        )
        reason = raw.reject or _process(raw, document, stages, counts)
        _count_record(document, reason, counts)
        yield document, reason
    if progress is not None and shard.size_bytes > position:
        progress(shard.size_bytes - position)


def _process(raw: RawRecord, document: Document, stages: _Stages, counts: ShardCounts) -> str:
    """Fill in text, language and failed rules; return the reason for a rejection, or nothing."""
    document.text = stages.text_of(raw)
    counts.text_bytes_in += len(document.text.encode())
    if not document.text.strip():
        return "no_text"
    reason = stages.check_language(document)
    _add(counts.languages, document.meta["language"])
    if reason:
        document.failed.append(reason)
        return reason
    stages.filters.apply(document)
    if document.failed:
        return document.failed[0]
    return "" if document.text.strip() else "no_text_after_filters"


def _count_record(document: Document, reason: str, counts: ShardCounts) -> None:
    counts.records += 1
    for rule in document.failed:
        _add(counts.failed_rules, rule)
    if reason:
        _add(counts.rejected, reason)
        return
    counts.kept += 1
    counts.text_bytes_kept += len(document.text.encode())
    _add(counts.kept_by_language, document.meta["language"])


def _count_damage(damage: Damage, counts: ShardCounts) -> None:
    counts.damage_count += 1
    counts.bytes_lost += damage.bytes_lost
    if len(counts.damage) < DAMAGE_SAMPLE:
        counts.damage.append(damage)
    if damage.unit in ("line", "row", "file"):
        counts.records += 1
        _add(counts.rejected, damage.reason)


def _add(counts: dict[str, int], key: str) -> None:
    counts[key] = counts.get(key, 0) + 1


def document_row(document: Document) -> dict[str, object]:
    """A kept document as a row of docs.parquet."""
    return {
        "doc_id": document.doc_id,
        "text": document.text,
        "source": document.source,
        "url": document.url,
        "meta": document.meta,
    }


def _reject_row(document: Document, reason: str) -> dict[str, object]:
    return {
        "doc_id": document.doc_id,
        "url": document.url,
        "reason": reason,
        "failed": " ".join(document.failed),
        "text": document.text[:REJECT_CHARACTERS],
    }
