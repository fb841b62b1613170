import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data_pipeline.filter_case import run_filter


@pytest.mark.parametrize(("n", "failed"), [(299, ["length.min_characters"]), (300, []), (0, ["length.min_characters"])])
def test_documents_below_three_hundred_characters_go(n: int, failed: list[str]) -> None:
    assert run_filter("length", "x" * n).failed == failed


@given(st.text(" \na", max_size=50))
def test_words_are_what_white_space_separates(text: str) -> None:
    found = run_filter("length", text, min_characters=None, min_words=2, max_words=3, max_characters=20)
    n_words = len(text.split())
    assert found.measures == {"length.characters": len(text), "length.words": n_words}
    assert ("length.min_words" in found.failed) == (n_words < 2)
    assert ("length.max_words" in found.failed) == (n_words > 3)
    assert ("length.max_characters" in found.failed) == (len(text) > 20)
