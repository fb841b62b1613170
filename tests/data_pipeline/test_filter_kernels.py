"""The compiled loops give what the definitions in plain Python give."""

import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.filters import kernels
from data_pipeline.filters.c4 import C4, bind_c4
from data_pipeline.filters.text_view import TextView, WordSet, count_repeats

EVERY_CHARACTER = [chr(code) for code in range(0x110000)]
# Few different words, so that they repeat, and the signs, spaces and letters on which the rules turn.
PIECES = ["a", "b", "ab", "It's", "it\u2019s", "3", "3.14", "_", "é", "字", "²", "Ⅷ", "\u0301", "👯", "İ", "ß", "٣"]
SIGNS = [
    " ",
    "  ",
    "\n",
    "\n\n",
    "\n\n\n",
    "\t",
    "\x0b",
    "\x1c",
    "\x85",
    "\xa0",
    "\u2028",
    "\u3000",
    *".,:@'!?\"()[]-#{}",
]
texts = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(PIECES + SIGNS), max_size=60).map("".join),
    st.lists(st.sampled_from(["a ", "b ", "ab "]), max_size=60).map("".join),
)


@pytest.fixture(scope="module", autouse=True)
def compiled_kernels() -> None:
    """Compiling would not fit into the deadline of an example."""
    view = TextView("a b a b")
    assert (view.count_present(WordSet(["a"])), view.pieces) == (1, (4, 4))
    assert (view.n_sentences, view.repeated_ngram_characters) == (1, [6] + [0] * 8)


def test_characters_are_of_the_classes_that_python_says() -> None:
    table = kernels.character_classes()
    assert len(table) == len(EVERY_CHARACTER)
    spaces = {place for place, char in enumerate(EVERY_CHARACTER) if char.isspace()}
    assert set(np.flatnonzero(table & 2).tolist()) == spaces
    words = {match.start() for match in re.finditer(r"\w", "".join(EVERY_CHARACTER))}
    assert set(np.flatnonzero(table & 1).tolist()) == words
    assert set(np.flatnonzero(table & 4).tolist()) == {
        place for place, char in enumerate(EVERY_CHARACTER) if char.isalpha()
    }


@given(texts)
@example("")
@example("a")
@example("'a''a'a'")
def test_words_are_counted_as_by_the_pattern_of_tokens(text: str) -> None:
    view = TextView(text)
    tokens = re.findall(r"\w+(?:['\u2019]\w+)?|[^\w\s]", text)
    assert view.tokens == tokens
    words = [token for token in tokens if re.match(r"\w", token)]
    counts = view.words
    assert (counts.n_tokens, counts.n_words, counts.word_characters) == (len(tokens), len(words), len("".join(words)))
    spaced = text.split()
    assert counts.n_spaced == len(spaced)
    assert counts.n_lettered_spaced == sum(any(map(str.isalpha, word)) for word in spaced)


@given(texts)
@example("U.S.A. me@here.org 3.14 it's 'quoted' ... -- a.1 1.a a,,b '''")
def test_pieces_are_counted_as_by_their_pattern(text: str) -> None:
    pieces: list[str] = []
    joined = False
    for part in re.finditer(r"(\w+)|(\s+)|([^\w\s])", text):
        before, after = text[: part.start()][-1:], text[part.end() :][:1]
        inside = bool(re.match(r"\w\w", f"{before}{after}"))
        if part[1]:
            if joined:
                pieces[-1] += part[1]
            else:
                pieces.append(part[1])
            joined = False
        elif part[3]:
            joined = inside and part[3] in ".,:@"
            if not (inside and part[3] in ".,:@'\u2019") and before != part[3]:
                pieces.append(part[3])
    assert TextView(text).pieces == (len(pieces), sum(any(map(str.isalpha, piece)) for piece in pieces))


@given(texts, st.lists(st.sampled_from([*PIECES, "no such word", "", "."]), max_size=8))
def test_words_are_found_among_the_tokens(text: str, words: list[str]) -> None:
    assert TextView(text).count_present(WordSet(words)) == len(set(words) & set(TextView(text).tokens))


def top_ngram_characters(tokens: list[str], n: int) -> int:
    counts = Counter(tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1))
    most = max(counts.values(), default=0)
    return max((len(" ".join(ngram)) * count for ngram, count in counts.items() if count == most > 1), default=0)


def duplicate_ngram_characters(tokens: list[str], n: int) -> int:
    """As in datatrove's find_all_duplicate, on tuples instead of joined strings."""
    seen, characters, at = set(), 0, 0
    while at <= len(tokens) - n:
        ngram = tuple(tokens[at : at + n])
        if ngram in seen:
            characters, at = characters + len("".join(ngram)), at + n
        else:
            seen.add(ngram)
            at += 1
    return characters


@given(texts)
@example("a b " * 30)
@example("a " * 64)
def test_repeated_ngrams_are_counted_as_by_definition(text: str) -> None:
    view = TextView(text)
    expected = [top_ngram_characters(view.tokens, n) for n in (2, 3, 4)]
    expected += [duplicate_ngram_characters(view.tokens, n) for n in range(5, 11)]
    assert view.repeated_ngram_characters == expected


@given(texts)
def test_lines_and_paragraphs_are_those_of_a_regular_expression(text: str) -> None:
    view = TextView(text)
    assert view.lines == [line for line in re.split(r"\n+", text) if line.strip()]
    assert view.paragraphs == [block for block in re.split(r"\n{2,}", text.strip()) if block.strip()]


@given(st.lists(st.sampled_from(["a", "b", "cc", "ddd"]), max_size=12))
def test_repeats_are_parts_seen_before(parts: list[str]) -> None:
    repeats = [part for at, part in enumerate(parts) if part in parts[:at]]
    assert count_repeats(parts) == (len(repeats), len("".join(repeats)))


def sentences_of_line(line: str) -> int:
    ends = list(re.finditer(r"[.?!]+[\"'\u201d\u2019)\]]*(?=\s|$)", line))
    return max(len(ends) + bool(ends and line[ends[-1].end() :].strip()), 1)


@given(texts)
@example('He said "Go. " and\nleft.\n...')
def test_sentences_are_counted_line_by_line(text: str) -> None:
    assert TextView(text).n_sentences == sum(sentences_of_line(line) for line in text.split("\n") if line.strip())


def c4_line(raw: str, words: int, *, ends: bool) -> str | None:
    """One line by the rules of C4's code, each looked at by itself."""
    line = raw.strip()
    if any(len(word) > 12 for word in line.split()):
        return None
    line = re.sub(r"\[\d*\]|\[edit\]|\[citation needed\]", "", line)
    if ends and (not line.endswith((".", "?", "!", '"')) or line.endswith("...")):
        return None
    phrases = ("javascript", "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies")
    unwanted = any(phrase in line.lower() for phrase in (*phrases, "use cookies"))
    return None if len(line.split()) < words or unwanted else line


C4_PIECES = [
    *("a duck ", "of ", "[1]", "[edit]", "java", "script ", "Use ", "of coo\u212aies ", "privacy policy "),
    "s",
]
C4_PIECES += [
    *(". ", '"', "...", "?", "\n", "\r\n", "\x85", "\n\n", "\u2028", "longer than twelve", "exactlytwelv", " ")
]


@given(st.lists(st.sampled_from(C4_PIECES), max_size=40).map("".join), st.integers(0, 4), st.booleans())
def test_c4_keeps_the_lines_that_its_code_keeps(text: str, words: int, ends: bool) -> None:  # noqa: FBT001
    apply = bind_c4(C4(words_per_line=words, word_characters=12, terminal_punctuation=ends))
    kept = [line for raw in text.splitlines() if (line := c4_line(raw, words, ends=ends)) is not None]
    finding = apply(TextView(text))
    assert finding.text == "\n".join(kept)
    assert finding.measures["removed_lines"] == len(text.splitlines()) - len(kept)


@pytest.mark.parametrize("module", ["data_pipeline.config", "data_pipeline.filters.registry"])
def test_reading_a_configuration_does_not_wait_for_numba(module: str) -> None:
    code = f"import sys, {module}; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
