"""C4's rules, as its code has them: keep the lines that look like sentences, drop pages with too few of them.

Source: Raffel et al. 2020, section 2.2, and `c4_utils.py` of tensorflow/datasets (_MIN_WORDS_PER_LINE = 5,
_MIN_NUM_SENTENCES = 3, _MAX_WORD_LENGTH = 1000, at most 190,000 characters a page); datatrove has the first two numbers
swapped. Deviations: sentences end where `.`, `?` or `!` is followed by white space or the line's end, not where NLTK's
punkt model says; C4's list of bad words, which it looks for in the kept lines, is the filter `bad_words` placed after
this one; line deduplication over the whole corpus is another stage's work.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from data_pipeline.filters.rules import Apply, Finding, Settings
from data_pipeline.filters.text_view import TextView

_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_UNWANTED = (
    "javascript",
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)


@dataclass(frozen=True, slots=True)
class C4(Settings):
    """Thresholds on the page, and which lines it keeps."""

    counts: ClassVar[tuple[str, ...]] = ("removed_lines",)

    max_lorem_ipsum: int | None = 0
    """Occurrences in the kept lines."""
    max_curly_brackets: int | None = 0
    """Opening ones in the kept lines."""
    max_page_characters: int | None = 190_000
    """Of the page before any line goes."""
    min_sentences: int | None = 3
    """In the kept lines."""
    words_per_line: int = 5
    """A line of fewer words goes."""
    word_characters: int = 1000
    """A line with a longer word goes."""
    terminal_punctuation: bool = True
    """Lines that do not end like a sentence go; FineWeb switches this off."""


def bind_c4(settings: C4) -> Apply:
    """The measuring function, which leaves the kept lines, stripped of white space and citation marks."""

    def apply(view: TextView) -> Finding:
        raw = view.text.splitlines()
        kept = _kept_lines(view.text, raw, settings)
        cleaned = "\n".join(kept)
        measures = {
            "lorem_ipsum": cleaned.lower().count("lorem ipsum"),
            "curly_brackets": cleaned.count("{"),
            "page_characters": len(view.text),
            "sentences": TextView(cleaned).n_sentences,
            "removed_lines": len(raw) - len(kept),
        }
        return Finding(measures, cleaned)

    return apply


def _kept_lines(text: str, lines: list[str], settings: C4) -> list[str]:
    # Most pages hold no citation and no unwanted phrase: looking once at the page spares looking at every line.
    has_citation = _CITATION.search(text) is not None if "[" in text else False
    page = (_CITATION.sub("", text) if has_citation else text).lower()
    unwanted = tuple(phrase for phrase in _UNWANTED if phrase in page)
    kept = []
    for raw in lines:
        line = raw.strip()
        if len(line) > settings.word_characters and max(map(len, line.split())) > settings.word_characters:
            continue
        if has_citation:
            line = _CITATION.sub("", line)
        if _is_kept(line, unwanted, settings):
            kept.append(line)
    return kept


def _is_kept(line: str, unwanted: tuple[str, ...], settings: C4) -> bool:
    if settings.terminal_punctuation and (not line.endswith((".", "?", "!", '"')) or line.endswith("...")):
        return False
    if len(line.split(None, settings.words_per_line)) < settings.words_per_line:
        return False
    if not unwanted:
        return True
    lower = line.lower()
    return not any(phrase in lower for phrase in unwanted)
