"""The `extract` stage: pages of a shard -> their text. Thresholds can change without doing this again.

docs.parquet       every page that has text
rejects.parquet    of the others the first of each reason
"""

from __future__ import annotations

from pathlib import Path

from data_pipeline.config import ExtractSection, Source
from data_pipeline.document import Shard
from data_pipeline.extract.engines import open_extractor
from data_pipeline.extract.watchdog import Watchdog
from data_pipeline.filters.url_filter import UrlBlocklist
from data_pipeline.intake import Account, DocumentFiles, read_documents
from data_pipeline.sources.record import RawRecord
from data_pipeline.tasks import Counts, Progress


def extract_documents(
    folder: Path,
    shard: Shard,
    source: Source,
    settings: ExtractSection,
    blocklist: Path | None = None,
    poison: Path | None = None,
    progress: Progress | None = None,
) -> Counts:
    """Write the text of a shard's pages; the same input gives the same bytes.

    Args:
        folder: where to.
        shard: what to read.
        source: the source it belongs to.
        settings: the extractor and its time limit.
        blocklist: folder of the compiled URL lists.
        poison: notes the pages that ended an earlier attempt; they are rejected as `extract.timeout`.
        progress: called with bytes of the file and pages.

    Raises:
        DataError: the shard cannot be opened.
    """
    extract = open_extractor(settings)
    account = Account()
    watchdog = Watchdog(settings.timeout_seconds, poison)

    def text_of(raw: RawRecord) -> tuple[str, str]:
        if raw.text is not None:
            return raw.text, ""
        return watchdog.run(raw.ordinal, extract, raw.html, raw.charset)

    urls = UrlBlocklist.open(blocklist) if blocklist is not None else None
    with watchdog, DocumentFiles(folder, account) as files:
        for document, reason in read_documents(shard, source, urls, text_of, account, progress):
            files.add(document, reason)
    return account.counts()
