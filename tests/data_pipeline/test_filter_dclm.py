import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.document import Document
from data_pipeline.filters.dclm import DCLM, clean_line
from data_pipeline.filters.registry import build_filters

PROSE = "\n".join(f"Duck number {number} swims over to the other side of the pond." for number in range(20))


def cleaned(text: str, **settings: object) -> Document:
    document = Document(0, text, "s")
    build_filters({"dclm": settings}).apply(document)
    return document


@pytest.mark.parametrize(
    "line",
    [
        "SUBSCRIBE TO OUR news",  # 14 capitals of 21 characters
        "ÄÖÜÄÖ äö",
        "1234567",
        "3 likes",
        "* 1,204 Comments!",
        "2.5k  Followers",
        "Home",
        "   ",
        "Items in cart",
        "Read more...",
        " sign-in",
    ],
)
def test_lines_of_the_page_go(line: str) -> None:
    document = cleaned(f"{PROSE}\n{line}\n{PROSE}", max_removed_words=1.0)
    assert document.text == f"{PROSE}\n{PROSE}"
    assert document.measures["dclm.removed_lines"] == 1


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("NATO ducks", "NATO ducks"),  # 4 of 10
        ("ABCDE fghi", "ABCDE fghi"),  # just half
        ("12 34", "12 34"),
        ("3 likes of mine", "3 likes of mine"),
        ("Two words", "Two words"),
        ("", ""),
        ("There are 3 items in cart", "There are 3"),
        ("Ducks can swim. Read more...", "Ducks can swim."),
        ("Read more... about ducks", "Read more... about ducks"),
        ("Read more!!!", "Read more!!!"),
        ("Sign-in to see ducks", "to see ducks"),
        ("Please sign-in now", "Please sign-in now"),
        ("one two three four five six seven eight read more...", "one two three four five six seven eight"),
        (
            "one two three four five six seven eight nine read more...",
            "one two three four five six seven eight nine read more...",
        ),
    ],
)
def test_phrases_go_out_of_short_lines_and_other_lines_stay(line: str, kept: str) -> None:
    assert cleaned(f"{PROSE}\n{line}\n{PROSE}").text == f"{PROSE}\n{kept}\n{PROSE}"


def test_a_page_that_loses_more_than_a_twentieth_of_its_words_goes() -> None:
    nineteen, twenty = "\n".join(["one duck"] * 19), "\n".join(["one duck"] * 38)
    kept = cleaned(f"{twenty}\nSHOUT SHOUT SHOUT SHOUT")
    assert (kept.failed, kept.measures["dclm.removed_words"]) == ([], pytest.approx(4 / 80))
    dropped = cleaned(f"{nineteen}\nSHOUT SHOUT SHOUT")
    assert dropped.failed == ["dclm.max_removed_words"]
    assert dropped.measures["dclm.removed_words"] == pytest.approx(3 / 41)


@pytest.mark.parametrize("text", ["", " \n ", "...\n--", "HOME\nNEWS"])
def test_a_page_without_words_loses_all_of_them(text: str) -> None:
    document = cleaned(text)
    assert document.failed == ["dclm.max_removed_words"]
    assert document.measures["dclm.removed_words"] == 1.0


def test_thresholds_of_lines_can_be_set() -> None:
    assert clean_line("Home", DCLM(words_per_line=1)) == "Home"
    assert clean_line("SHOUT IT", DCLM(uppercase_characters=1.0)) == "SHOUT IT"
    assert clean_line("Ducks swim. Read more...", DCLM(phrase_line_words=3)) == "Ducks swim. Read more..."


@given(st.text(alphabet="ABÄabä1ⅧⒶ .", min_size=1, max_size=20))
def test_capitals_are_those_that_python_says(line: str) -> None:
    loud = sum(char.isupper() for char in line) / len(line) > 0.5
    stays = clean_line(line, DCLM(words_per_line=0)) is not None
    assert stays == (not loud and not line.isdigit() and bool(line.strip()))
