"""C4's rules, as its code has them: keep the lines that look like sentences, drop pages with too few of them.

Source: Raffel et al. 2020, section 2.2, and `c4_utils.py` of tensorflow/datasets (_MIN_WORDS_PER_LINE = 5,
_MIN_NUM_SENTENCES = 3, _MAX_WORD_LENGTH = 1000, at most 190,000 characters a page); datatrove has the first two numbers
swapped. Deviations: sentences end where `.`, `?` or `!` is followed by white space or the line's end, not where NLTK's
punkt model says; the list of bad words is empty unless the job names one; line deduplication over the whole corpus is
another stage's work.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.filters.text_view import TextView

_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_SENTENCE_END = re.compile(r"[.?!]+[\"'\u201d\u2019)\]]*(?=\s|$)")
_POLICY_PHRASES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)


@dataclass(frozen=True, slots=True)
class C4:
    """Thresholds."""

    min_words_per_line: int = 5
    min_sentences: int = 3
    max_word_characters: int = 1000
    max_page_characters: int = 190_000
    terminal_punctuation: bool = True
    """Drop lines that do not end like a sentence; FineWeb switches this rule off."""
    drop_curly_bracket: bool = True
    drop_lorem_ipsum: bool = True
    bad_words: tuple[str, ...] = ()
    """A page with one of these in a kept line is dropped; words match whole and in lower case."""


def clean_c4(view: TextView, limits: C4) -> str:
    """The text with only the lines that C4 keeps, each stripped of white space and citation marks."""
    return "\n".join(_kept_lines(view.text, limits))


def c4(view: TextView, cleaned: str, limits: C4) -> Iterator[str]:
    """Names of the rules that the page fails.

    Args:
        view: the page as it was.
        cleaned: what `clean_c4` left of it.
        limits: the thresholds.
    """
    if limits.drop_lorem_ipsum and "lorem ipsum" in cleaned.lower():
        yield "lorem_ipsum"
    if limits.drop_curly_bracket and "{" in cleaned:
        yield "curly_bracket"
    if limits.bad_words and _has_bad_word(cleaned, limits.bad_words):
        yield "bad_word"
    if len(view.text) > limits.max_page_characters:
        yield "page_too_long"
    if count_sentences(cleaned) < limits.min_sentences:
        yield "too_few_sentences"


def count_sentences(text: str) -> int:
    """Sentences in a text whose lines each begin a new one; a line without an end mark is one sentence."""
    return sum(
        max(len(_SENTENCE_END.findall(line)) + _has_open_end(line), 1) for line in text.split("\n") if line.strip()
    )


def _has_open_end(line: str) -> bool:
    ends = list(_SENTENCE_END.finditer(line))
    return bool(ends) and bool(line[ends[-1].end() :].strip())


def _kept_lines(text: str, limits: C4) -> Iterator[str]:
    for raw in text.splitlines():
        stripped = raw.strip()
        if any(len(word) > limits.max_word_characters for word in stripped.split()):
            continue
        line = _CITATION.sub("", stripped)
        if _is_kept(line, limits):
            yield line


def _is_kept(line: str, limits: C4) -> bool:
    if limits.terminal_punctuation and (not line.endswith((".", "?", "!", '"')) or line.endswith("...")):
        return False
    if len(line.split()) < limits.min_words_per_line:
        return False
    lower = line.lower()
    return "javascript" not in lower and not any(phrase in lower for phrase in _POLICY_PHRASES)


def _has_bad_word(text: str, bad_words: tuple[str, ...]) -> bool:
    anyone = "|".join(map(re.escape, bad_words))
    return re.search(rf"(?:^|[^a-z])(?:{anyone})(?:$|[^a-z])", text.lower()) is not None
