"""The stage `blocklist`: lists of domains, addresses and words into what `UrlBlocklist.open` maps.

Domains and addresses become sorted 64-bit hashes: 8 bytes an entry, so that the 4.6 million domains of UT1 take 36 MB
once a machine instead of several hundred in every process. The price is a wrong block once in 4 * 10^12 lookups.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import UrlFilterSection
from data_pipeline.filters.url_filter import (
    DOMAINS_FILE,
    HOSTS_FILE,
    URLS_FILE,
    WORDS_FILE,
    Hashes,
    hash_entry,
    host_of,
    normal_address,
    normal_domain,
)
from data_pipeline.filters.word_list import read_list_lines
from data_pipeline.tasks import Counts, Progress
from megagpt.errors import DataError

_LINES_A_REPORT = 100_000
_EXAMPLES = 20


def blocklist_files(settings: UrlFilterSection) -> list[Path]:
    """Every file that the section names, those found in its folders included, each once and in a fixed order.

    Raises:
        DataError: a file or folder is not there, or a folder has no list in it.
    """
    return list(
        dict.fromkeys(
            [
                *_files_of(settings.domains, "domains"),
                *_files_of(settings.urls, "urls"),
                *_files_of((*settings.words, *settings.subwords, *settings.soft_words), ""),
            ]
        )
    )


def write_blocklist(folder: Path, settings: UrlFilterSection, progress: Progress | None = None) -> Counts:
    """Compile the lists of a section into domains.npy, urls.npy and words.json.

    The documents of the counts are lines: out are entries; rejected are blank lines and comments, duplicates, and
    lines that are no domain, no address or no word (the first of these are named in detail.bad_lines).

    Args:
        folder: where the files go.
        settings: the lists.
        progress: told of bytes and lines.

    Raises:
        DataError: a list is missing or damaged, or has lines but not one entry among them.
    """
    reader = _Reader(progress)
    domains = reader.hashes(_files_of(settings.domains, "domains"), normal_domain, "not_a_domain")
    hosts = array("Q")
    urls = reader.hashes(_files_of(settings.urls, "urls"), normal_address, "not_an_address", hosts)
    for file, hashes in ((DOMAINS_FILE, domains), (URLS_FILE, urls), (HOSTS_FILE, _distinct(hosts))):
        np.save(folder / file, hashes, allow_pickle=False)
    words: dict[str, Any] = {
        kind: reader.words(_files_of(getattr(settings, kind), ""), kind) for kind in ("words", "subwords", "soft_words")
    }
    sizes = {"domains": len(domains), "urls": len(urls), **{kind: len(entries) for kind, entries in words.items()}}
    words["max_soft_words"] = settings.max_soft_words
    (folder / WORDS_FILE).write_text(json.dumps(words, ensure_ascii=False, indent=1) + "\n")
    reader.report()
    return Counts(
        reader.lines,
        sum(sizes.values()),
        {reason: number for reason, number in sorted(reader.rejected.items()) if number},
        {"entries": sizes, "bad_lines": reader.bad_lines},
    )


def _files_of(paths: Iterable[Path], name: str) -> list[Path]:
    """Files of a setting; in a folder, those named `name` or `name`.gz at any depth."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir() and name:
            inside = sorted(file for file in path.rglob(f"{name}*") if file.name in (name, f"{name}.gz"))
            if not inside:
                raise DataError(f"{path}: no file named {name} or {name}.gz in this folder; url_filter names it")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path}: no such file; url_filter names it as a blocklist")
    return found


class _Reader:
    """Reads lists and counts what becomes of each line."""

    def __init__(self, progress: Progress | None) -> None:
        self.lines = 0
        self.rejected: dict[str, int] = {"blank_or_comment": 0, "duplicate": 0}
        self.bad_lines: list[str] = []
        self._progress = progress
        self._reported_lines = 0
        self._bytes = 0

    def hashes(
        self, files: Iterable[Path], normalise: Callable[[str], str], reason: str, hosts: array[int] | None = None
    ) -> Hashes:
        """The sorted, distinct hashes of the entries of all files; those of their hosts are added to `hosts`."""
        collected = array("Q")
        for path in files:
            before = len(collected)
            for entry in self._entries(path, normalise, reason):
                collected.append(hash_entry(entry))
                if hosts is not None:
                    hosts.append(hash_entry(host_of(entry)))
            self._check_some(path, len(collected) - before, reason)
        found = _distinct(collected)
        self._count("duplicate", len(collected) - len(found))
        return found

    def words(self, files: Iterable[Path], kind: str) -> list[str]:
        """The entries of word lists in lower case, letters and digits only, sorted."""
        collected: set[str] = set()
        for path in files:
            n_entries = 0
            for entry in self._entries(path, _normal_word, f"not_in_{kind}"):
                n_entries += 1
                self._count("duplicate", int(entry in collected))
                collected.add(entry)
            self._check_some(path, n_entries, "not_a_word")
        return sorted(collected)

    def report(self) -> None:
        """Tell the progress of what it was not told yet."""
        if self._progress is not None:
            self._progress(self._bytes, self.lines - self._reported_lines)
        self._reported_lines, self._bytes = self.lines, 0

    def _entries(self, path: Path, normalise: Callable[[str], str], reason: str) -> Iterator[str]:
        for number, raw in enumerate(read_list_lines(path, "url_filter"), start=1):
            self.lines += 1
            self._bytes += len(raw) + 1
            if self.lines - self._reported_lines >= _LINES_A_REPORT:
                self.report()
            line = raw.decode("utf-8", "replace")
            entry = line.partition(" #")[0].strip().removeprefix("\ufeff")
            if not entry or entry.startswith("#"):
                self._count("blank_or_comment", 1)
            elif "\ufffd" in entry or not (normal := normalise(entry)):
                self._count(reason, 1)
                if len(self.bad_lines) < _EXAMPLES:
                    self.bad_lines.append(f"{path.name}:{number}: {entry[:100]}")
            else:
                yield normal

    def _count(self, reason: str, number: int) -> None:
        self.rejected[reason] = self.rejected.get(reason, 0) + number

    def _check_some(self, path: Path, n_entries: int, reason: str) -> None:
        if not n_entries and self.rejected.get(reason):
            raise DataError(
                f"{path}: not one entry ({reason.replace('_', ' ')}, first {self.bad_lines[0]!r}); url_filter wants "
                "one entry a line"
            )


def _distinct(collected: array[int]) -> Hashes:
    # Sorted in place and masked: np.unique takes several times the memory.
    hashes: Hashes = np.frombuffer(collected, dtype=np.uint64)
    hashes.sort()
    is_first = np.ones(len(hashes), dtype=np.bool_)
    np.not_equal(hashes[1:], hashes[:-1], out=is_first[1:])
    return hashes[is_first]


def _normal_word(entry: str) -> str:
    return "".join(character for character in entry.lower() if character.isalnum())
