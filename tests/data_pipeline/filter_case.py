"""One filter on one text, as a job runs it."""

from __future__ import annotations

import gzip
import time
from pathlib import Path
from typing import Any

from data_pipeline.document import Document, Shard
from data_pipeline.extract.html import extract_html
from data_pipeline.filters.registry import build_filters
from data_pipeline.sources.record import RawRecord
from data_pipeline.sources.warc import read_warc

PAGES = Path(__file__).resolve().parents[3] / "shared" / "data" / "web" / "pages.warc.gz"


def run_filter(name: str, text: str, **settings: Any) -> Document:
    """The document as the filter leaves it."""
    document = Document(0, text, "s")
    build_filters({name: settings}).apply(document)
    return document


def clean(name: str, text: str, **settings: Any) -> str:
    """The text as the filter leaves it."""
    return run_filter(name, text, **settings).text


def extracted_pages(path: Path, most: int) -> list[str]:
    """Texts of the first pages of an archive of real pages."""
    records = (r for r in read_warc(Shard(0, "s", "warc", str(path), 0)) if isinstance(r, RawRecord) and r.html)
    return [extract_html(record.html or b"") for record, _ in zip(records, range(most), strict=False)]


def cpu_seconds(name: str, text: str, **settings: Any) -> float:
    """What the filter costs on a text, in CPU-seconds, without reading its settings."""
    chain = build_filters({name: settings})
    chain.apply(Document(0, "", "s"))
    before = time.process_time()
    chain.apply(Document(0, text, "s"))
    return time.process_time() - before


def write_gzip(path: Path, text: str) -> Path:
    """A gzip-compressed text file."""
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return path
