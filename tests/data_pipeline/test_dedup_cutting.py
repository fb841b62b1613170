import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.dedup.cutting import cut


def marked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A text whose cuts stand in [brackets], without them, and the cuts."""
    plain, spans = "", []
    for part in re.split(r"(\[[^]]*\])", text):
        if part.startswith("["):
            spans.append((len(plain), len(plain) + len(part) - 2))
        plain += part.strip("[]")
    return plain, spans


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("one\n[two]\nthree", "one\nthree"),
        ("one\n[two]\n[three]\nfour\n", "one\nfour\n"),
        ("[one]\ntwo", "two"),
        ("one\n[two]", "one"),
        ("one\n[two]\n", "one\n"),
        ("one\n\n[two]\n\nthree", "one\n\nthree"),
        ("one\n \n[two]\nthree", "one\n\nthree"),
        ("one\n[two]\n\n[three]\nfour", "one\n\nfour"),
        ("one [two] three", "one three"),
        ("one[two]three", "one three"),
        ("one [two], three", "one , three"),
        ("one [two]\nthree", "one\nthree"),
        ("one\n[two] three", "one\nthree"),
        ("one [two\nthree] four", "one\nfour"),
        ("one [two\n\nthree] four", "one\n\nfour"),
        ("if x:\n    [a = 1]\n    b = 2\n", "if x:\n    b = 2\n"),
        ("if x:\n    [a = 1;] b = 2\n", "if x:\n    b = 2\n"),
        ("[#!/bin/sh]\n  indented", "  indented"),
        ("  one [two] ", "  one"),
        ("\n\none\n[two]\nthree\n\n\nfour\n\n\n", "\n\none\nthree\n\n\nfour\n\n\n"),
        ("[one]\n[two]\n", ""),
        ("[one two]", ""),
        ("ein\u2028[zwei]\u2028drei", "ein drei"),
    ],
)
def test_what_is_left_reads_as_if_nothing_had_been_there(text: str, left: str):
    plain, spans = marked(text)
    assert cut(plain, spans) == left


@given(
    st.text("ab \n\t", max_size=40).flatmap(
        lambda text: st.tuples(st.just(text), st.lists(st.integers(0, len(text)), max_size=6, unique=True).map(sorted))
    )
)
@example(("a \n b", [0, 1]))
def test_visible_characters_outside_of_cuts_stay_and_none_inside_do(case: tuple[str, list[int]]):
    text, bounds = case
    spans = list(zip(bounds[::2], bounds[1::2], strict=False))
    left = cut(text, spans)
    kept = "".join(c for i, c in enumerate(text) if not any(start <= i < end for start, end in spans))
    assert "".join(left.split()) == "".join(kept.split())
    if spans:
        # Words that a cut did not join stay apart, and no blank line comes up that was not there.
        assert len(left.split()) >= len(kept.split())
        assert "\n\n" not in left or re.search(r"\n\s*\n", text)
    else:
        assert left == text or not text.strip()
