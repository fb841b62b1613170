"""What the stages `extract` and `filter` share: records as documents, and the account of what became of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from data_pipeline.config import Source
from data_pipeline.document import Damage, Document, Shard
from data_pipeline.filters.url_filter import UrlBlocklist
from data_pipeline.parquet_writer import DOCUMENT_SCHEMA, REJECT_SCHEMA, BoundedWriter
from data_pipeline.sources.record import RawRecord
from data_pipeline.sources.shards import read_shard
from data_pipeline.tasks import Counts, Progress

DOCUMENTS_FILE = "docs.parquet"
REJECTS_FILE = "rejects.parquet"
REJECT_SAMPLE = 200
"""Rejected documents kept for a person to look at, a reason and shard."""
REJECT_CHARACTERS = 500
DAMAGE_SAMPLE = 1000
"""Damages listed one by one, a shard; all are counted."""

TextOf = Callable[[RawRecord], tuple[str, str]]
"""(text, reason why there is none)."""


@dataclass
class Account:
    """Where every record of a shard went: records = kept + the sum of rejected, also source by source."""

    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    sources: dict[str, Counter[str]] = field(default_factory=dict)
    """Source -> reason -> records; kept ones under the empty reason."""
    damage: list[Damage] = field(default_factory=list)
    damage_count: int = 0
    bytes_lost: int = 0
    text_bytes_in: int = 0
    """UTF-8 bytes of the texts that came in, or that extraction gave."""
    text_bytes_kept: int = 0

    def count(self, source: str, reason: str) -> None:
        """One record more; an empty reason means it was kept."""
        if reason:
            self.rejected[reason] += 1
        else:
            self.kept += 1
        self.sources.setdefault(source, Counter())[reason] += 1

    def count_damage(self, damage: Damage, source: str) -> None:
        """A damaged line, row or file is one rejected record; what a stretch of bytes held nobody can know."""
        self.damage_count += 1
        self.bytes_lost += damage.bytes_lost
        if len(self.damage) < DAMAGE_SAMPLE:
            self.damage.append(damage)
        if damage.unit in ("line", "row", "file"):
            self.count(source, damage.reason)

    def counts(self, **detail: Any) -> Counts:
        """In the form that every task reports in."""
        return Counts(
            documents_in=self.kept + self.rejected.total(),
            documents_out=self.kept,
            rejected=dict(self.rejected),
            detail={
                "sources": {name: dict(reasons) for name, reasons in self.sources.items()},
                "damage": [dataclasses.asdict(damage) for damage in self.damage],
                "damage_count": self.damage_count,
                "bytes_lost": self.bytes_lost,
                "text_bytes_in": self.text_bytes_in,
                "text_bytes_kept": self.text_bytes_kept,
                **detail,
            },
        )


def read_documents(
    shard: Shard,
    source: Source,
    blocklist: UrlBlocklist | None,
    text_of: TextOf,
    account: Account,
    progress: Progress | None,
) -> Iterator[tuple[Document, str]]:
    """Every record of a shard as a document, with the reason for which it is none; damage goes to the account.

    Args:
        shard: what to read.
        source: where it belongs.
        blocklist: addresses that are not wanted, looked at before the text is.
        text_of: the text of a record.
        account: takes the damage and the size of the texts; the caller counts the documents.
        progress: called with the bytes of the file read and one document at a time.
    """
    position = 0
    for raw in read_shard(shard, source):
        if isinstance(raw, Damage):
            account.count_damage(raw, shard.source)
            continue
        if progress is not None:
            progress(max(raw.position - position, 0), 1)
            position = max(raw.position, position)
        document = Document(
            doc_id=shard.ordinal << 32 | raw.ordinal,
            text="",
            source=raw.meta.get(source.name_from, shard.source) if source.name_from else shard.source,
            url=raw.url,
            meta=raw.meta,
        )
        reason = raw.reject or (blocklist.why(raw.url) if blocklist is not None else "")
        if not reason:
            document.text, reason = text_of(raw)
            account.text_bytes_in += len(document.text.encode())
            if not reason and not document.text.strip():
                reason = "no_text"
        yield document, reason
    if progress is not None and shard.size_bytes > position:
        progress(shard.size_bytes - position, 0)


class DocumentFiles:
    """docs.parquet with what is kept, rejects.parquet with the first rejects of each reason; a context manager."""

    def __init__(self, folder: Path, account: Account) -> None:
        self._account = account
        self._kept = BoundedWriter(folder / DOCUMENTS_FILE, DOCUMENT_SCHEMA)
        self._rejects = BoundedWriter(folder / REJECTS_FILE, REJECT_SCHEMA)
        self._sampled: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._kept.__exit__(*error)
        self._rejects.__exit__(*error)

    def add(self, document: Document, reason: str) -> None:
        """Write and count one document; an empty reason means it is kept."""
        self._account.count(document.source, reason)
        if not reason:
            self._account.text_bytes_kept += len(document.text.encode())
            self._kept.add(_document_row(document), len(document.text))
        elif self._sampled[reason] < REJECT_SAMPLE:
            self._sampled[reason] += 1
            self._rejects.add(_reject_row(document, reason), REJECT_CHARACTERS)


def _document_row(document: Document) -> dict[str, object]:
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
