"""Common Crawl: the archives of a crawl from its list of paths.

Each crawl publishes `warc.paths.gz` and `wet.paths.gz`, a line for each of its 90,000 archives, such as
`crawl-data/CC-MAIN-2024-22/segments/1715971057216.39/warc/CC-MAIN-...-00000.warc.gz`. Source:
https://commoncrawl.org/get-started.
"""

from __future__ import annotations

import re

from data_pipeline.config import Source
from data_pipeline.sources.files import read_paths_file
from megagpt.errors import DataError

_LINE = re.compile(r"crawl-data/([^/]+)/\S+\.(?:warc|wet)\.gz")
_SHOWN = 3


def crawl_addresses(source: Source) -> list[str]:
    """The addresses of a crawl's archives, in the list's order: `prefix` and the line.

    Raises:
        DataError: `crawl` or `paths_file` is not set, the list cannot be read, or has lines that are no WARC or WET
            archive of this crawl.
    """
    if not source.crawl or source.paths_file is None:
        missing = "paths_file" if source.crawl else "crawl"
        name = source.name or source.crawl or "common_crawl"
        raise DataError(
            f"source {name!r}: {missing} is not set; a common_crawl source has a crawl (CC-MAIN-2024-22) and a "
            "paths_file (its warc.paths.gz or wet.paths.gz)"
        )
    lines = read_paths_file(source.paths_file)
    wrong: list[str] = []
    for line in lines:
        found = _LINE.fullmatch(line)
        if found is None or found[1] != source.crawl:
            wrong.append(line)
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise DataError(
            f"{source.paths_file}: {len(wrong)} of {len(lines)} lines are no WARC or WET archive of the crawl "
            f"{source.crawl}: {', '.join(wrong[:_SHOWN])}{more}. Set `crawl` to the list's crawl, or take its own list"
        )
    if not source.prefix:
        return lines
    return [source.prefix.rstrip("/") + "/" + line for line in lines]
