"""Obscene and otherwise bad words, from lists that the job names.

Lists in the format of LDNOOBW ("List of Dirty, Naughty, Obscene, and Otherwise Bad Words"): one word or phrase a line.
Every occurrence in lower case counts, of equal beginnings the longest, where the text has no letter or digit on either
side; entries in scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) count anywhere, whatever list
they are in.

Source: Raffel et al. 2020, section 2.2 (C4: a page with any such word goes; here placed after `c4`, as there only kept
lines are looked at); the share is RedPajama-v2's and data-juicer's `flagged_words`, at most 0.045 there. C4 has no word
bounded by a digit or an accented letter as one; here those are letters of the word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import xxhash

from data_pipeline.filters.rules import Apply, Finding, Settings
from data_pipeline.filters.text_view import TextView
from data_pipeline.filters.word_list import any_of, read_word_list
from megagpt.errors import ConfigError

_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"  # kana, Han
)
_WORD = re.compile(r"\w+")
_HASHES = 1 << 64


@dataclass(frozen=True, slots=True)
class BadWords(Settings):
    """Lists and thresholds."""

    counts: ClassVar[tuple[str, ...]] = ("found",)
    """Occurrences in pages that `keep_fraction` spares as well."""

    lists: tuple[Path, ...]
    """Files of words or phrases, one a line."""
    exceptions: tuple[str, ...] = ()
    """Entries of the lists that do not count."""
    max_bad_words: int | None = 0
    """Occurrences, each counted."""
    max_bad_word_share: float | None = None
    """Occurrences for each word of the text."""
    keep_fraction: float = 0.0
    """So many of the pages with bad words are measured as if they had none, chosen by a hash of the text."""
    seed: int = 0
    """Of that choice."""

    def __post_init__(self) -> None:
        if not self.lists:
            raise ConfigError("lists is empty; name files with one bad word a line, such as LDNOOBW's")
        if self.keep_fraction > 1:
            raise ConfigError(f"keep_fraction is {self.keep_fraction}; it is a share between 0 and 1")


def bind_bad_words(settings: BadWords) -> Apply:
    """The measuring function; reads the lists.

    Raises:
        DataError: a list is missing or not UTF-8.
    """
    entries = {entry for path in settings.lists for entry in read_word_list(path, "filters.bad_words.lists")}
    count = bad_word_counter(entries - {entry.lower() for entry in settings.exceptions})

    def apply(view: TextView) -> Finding:
        found = count(view.text)
        counted = 0 if found and _is_spared(view.text, settings) else found
        # The words are those that white space separates: they cost nothing where nothing was found.
        share = counted / max(len(view.text.split()), 1) if counted else 0.0
        return Finding({"bad_words": counted, "bad_word_share": share, "found": found})

    return apply


def bad_word_counter(entries: Iterable[str]) -> Callable[[str], int]:
    """A function that counts the occurrences of entries, given in lower case, in a text of any case."""
    distinct = set(entries)
    unspaced = {entry for entry in distinct if _WITHOUT_SPACES.search(entry)}
    spaced = distinct - unspaced
    find_unspaced = re.compile(any_of(unspaced) or "(?!)").finditer
    find_spaced = re.compile(rf"(?<!\w){any_of(spaced)}(?!\w)".replace(r"\ ", r"\s+") if spaced else "(?!)").finditer
    # An entry occurs only where its longest word does, and words are looked up quicker than a pattern is tried.
    telling = {max(_WORD.findall(entry), key=len, default="") for entry in spaced}
    has_signs_only = "" in telling

    def count(text: str) -> int:
        lower = text.lower()
        found = 0
        if has_signs_only or not telling.isdisjoint(_WORD.findall(lower)):
            found = sum(1 for _ in find_spaced(lower))
        if unspaced and not lower.isascii():
            found += sum(1 for _ in find_unspaced(lower))
        return found

    return count


def _is_spared(text: str, settings: BadWords) -> bool:
    drawn = xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), seed=settings.seed)
    return drawn < settings.keep_fraction * _HASHES
