import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.document import Document
from data_pipeline.filters.c4 import count_sentences
from data_pipeline.filters.gopher_repetition import (
    duplicate_ngram_characters,
    repeated_ngrams,
    top_ngram_characters,
)
from data_pipeline.filters.registry import FILTERS, build_filters
from data_pipeline.filters.text_view import TextView
from megagpt.errors import ConfigError

_WORDS = [
    *("pond", "river", "water", "green", "little", "bird", "swims", "sleeps"),
    *("under", "over", "bright", "cold", "morning", "evening", "grass", "stone"),
]


def prose(n_words: int, seed: int = 0) -> str:
    """Sentences of eleven words with stop words; no five words in a row occur twice."""
    draw = random.Random(seed)
    sentences = []
    for number in range(0, n_words, 11):
        words = draw.sample(_WORDS, 7)
        sentences.append(f"The {' '.join(words)} and the duck{number}.")
    return "\n".join(sentences)


def failed(name: str, text: str, **limits: object) -> list[str]:
    document = Document(0, text, "s")
    build_filters({name: limits}).apply(document)
    return [rule.removeprefix(f"{name}.") for rule in document.failed]


PLAIN = prose(110)


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_plain_prose_passes_every_filter_unchanged(name: str) -> None:
    document = Document(0, PLAIN, "s")
    build_filters({name: {}}).apply(document)
    assert (document.failed, document.text) == ([], PLAIN)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("The duck and the pond.", "too_few_words"),
        ("the and " * 50_001, "too_many_words"),
        ("I be to a of it in we he of and that so to at on " * 4, "words_too_short"),
        ("the and " + "internationalisation " * 60, "words_too_long"),
        (PLAIN + " #tag" * 14, "too_many_hashes"),
        (PLAIN.replace(".", " ... ... ..."), "too_many_ellipses"),
        (PLAIN.replace(".", "…").replace("\n", "… …\n"), "too_many_ellipses"),
        ("\n".join(f"- {line}" for line in PLAIN.split("\n")), "too_many_bullet_lines"),
        ("\n".join(f"  • {line}" for line in PLAIN.split("\n")), "too_many_bullet_lines"),
        (PLAIN.replace(".\n", "...\n"), "too_many_ellipsis_lines"),
        (PLAIN + " 12 34 5,6" * 10, "too_few_alphabetic_words"),
        (PLAIN.replace("The", "A").replace("and", "und"), "too_few_stop_words"),
    ],
)
def test_each_gopher_quality_rule_names_itself(text: str, rule: str) -> None:
    assert rule in failed("gopher_quality", text)


def test_gopher_quality_counts_words_without_punctuation_at_the_boundary() -> None:
    fifty = "the of " + " ".join(["duck"] * 48)
    assert failed("gopher_quality", fifty) == []
    assert failed("gopher_quality", fifty.removesuffix(" duck") + " ! ? ; :") == ["too_few_words"]


def test_an_empty_text_is_no_division_by_zero() -> None:
    for text in ("", " \n\n ", "\n"):
        assert failed("gopher_quality", text) == ["too_few_words", "too_few_stop_words"]
        assert failed("gopher_quality", text, min_words=0, min_stop_words=0) == []
        assert failed("gopher_repetition", text) == []
        assert failed("fineweb", text) == ["empty"]
        assert failed("c4", text) == ["too_few_sentences"]


BIRDS = "Swans glide slowly past reeds.\nGeese honk loudly at strangers.\nHerons wait quietly for fish."


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("Duck\nDuck\n" + BIRDS.split("\n")[0], "duplicate_lines"),  # 1 of 3 lines
        ("\n\n".join(["Duck", "Duck", "Goose"]), "duplicate_paragraphs"),
        (f"{BIRDS}\n{BIRDS.split(chr(10))[1]}", "duplicate_line_characters"),  # 32 of 124 characters
        (f"{BIRDS}\n\n{BIRDS}", "duplicate_paragraph_characters"),
        ("buy ducks " * 3 + BIRDS[:30], "top_2_gram"),
        ("buy white ducks " * 2 + BIRDS, "top_3_gram"),
        ("buy white ducks now " * 2 + BIRDS + BIRDS[:40], "top_4_gram"),
    ],
)
def test_each_gopher_repetition_rule_names_itself(text: str, rule: str) -> None:
    assert rule in failed("gopher_repetition", text)


@pytest.mark.parametrize("n", range(5, 11))
def test_each_duplicate_ngram_rule_has_its_own_threshold(n: int) -> None:
    # Ten words of five characters, said again: half of all characters but the spaces are repeated.
    words = [f"dck{number:02}" for number in range(10)]
    text = " ".join(words + words)
    assert f"duplicate_{n}_grams" in failed("gopher_repetition", text)
    share = {5: 50, 10: 50, 6: 30, 7: 35, 8: 40, 9: 45}[n] / len(text)
    limit = f"max_duplicate_{n}_grams"
    assert f"duplicate_{n}_grams" not in failed("gopher_repetition", text, **{limit: share + 1e-9})
    assert f"duplicate_{n}_grams" in failed("gopher_repetition", text, **{limit: share - 1e-9})


def test_a_short_text_that_repeats_nothing_passes_gopher_repetition() -> None:
    assert failed("gopher_repetition", "The quick brown fox jumps over") == []


def test_blank_lines_are_no_duplicate_lines() -> None:
    assert failed("gopher_repetition", BIRDS.replace("\n", "\n\n\n\n")) == []


@given(st.lists(st.sampled_from("abc"), max_size=40))
def test_ngram_counts_equal_a_count_by_definition(tokens: list[str]) -> None:
    positions = range(max(len(tokens) - 1, 0))
    for n in range(2, 11):
        ngrams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
        counts = Counter(ngrams)
        repeated = repeated_ngrams(tokens, n, positions)
        assert repeated == {at: ngram for at, ngram in enumerate(ngrams) if counts[ngram] > 1}
        if not repeated:
            return
        assert top_ngram_characters(repeated, n) == max(counts.values()) * (2 * n - 1)
        seen, characters, at = set(), 0, 0
        while at < len(ngrams):
            if ngrams[at] in seen:
                characters, at = characters + n, at + n
            else:
                seen.add(ngrams[at])
                at += 1
        assert duplicate_ngram_characters(repeated, n) == characters
        positions = [at for at in repeated if at + 1 in repeated]


GOOD = "The duck swims on a pond."


@pytest.mark.parametrize(
    "line",
    [
        "Home of the duck and the goose",  # no end mark
        "The duck swims on and on...",  # ellipsis
        "The duck swims.",  # three words
        "You must enable JavaScript to see the duck.",
        "The duck has a new privacy policy for you.",
        "This pond uses cookies to feed the duck.",
        "The duck says q" + "u" * 1000 + "ack every morning.",
    ],
)
def test_c4_drops_lines_that_are_no_sentences(line: str) -> None:
    document = Document(0, f"{GOOD}\n{line}\n  {GOOD}  \n{GOOD}", "s")
    build_filters({"c4": {}}).apply(document)
    assert (document.failed, document.text) == ([], f"{GOOD}\n{GOOD}\n{GOOD}")


def test_c4_wants_five_words_a_line_and_three_sentences_a_page() -> None:
    five, four = "Ducks swim on a pond.", "Ducks swim on ponds."
    assert failed("c4", "\n".join([five] * 3)) == []
    assert failed("c4", "\n".join([four] * 3)) == ["too_few_sentences"]
    assert failed("c4", "\n".join([five] * 2)) == ["too_few_sentences"]
    assert failed("c4", f"{five} {five} {five}") == []


@pytest.mark.parametrize(
    ("text", "limits", "rule"),
    [
        (f"{GOOD}\n" * 3 + "Lorem ipsum dolor sit amet now.", {}, "lorem_ipsum"),
        (f"{GOOD}\n" * 3 + "if (duck) { swim on a pond }.", {}, "curly_bracket"),
        (f"{GOOD}\n" * 3, {"bad_words": ["duck"]}, "bad_word"),
        (f"{GOOD}\n" * 7700, {}, "page_too_long"),
    ],
)
def test_each_c4_page_rule_names_itself(text: str, limits: dict[str, object], rule: str) -> None:
    assert failed("c4", text, **limits) == [rule]


def test_c4_bad_words_match_whole_words_only() -> None:
    assert failed("c4", f"{GOOD}\n" * 3, bad_words=["uck"]) == []


def test_c4_removes_citation_marks() -> None:
    document = Document(0, "\n".join(["The duck[1] swims[citation needed] on a pond.[23]"] * 3), "s")
    build_filters({"c4": {}}).apply(document)
    assert document.text.split("\n")[0] == GOOD


@pytest.mark.parametrize(
    ("text", "n"),
    [("One. Two! Three?", 3), ('He said "Go." Then left.', 2), ("Version 3.5 is out.", 1), ("No end", 1), ("", 0)],
)
def test_sentences_are_counted_by_their_ends(text: str, n: int) -> None:
    assert count_sentences(text) == n


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("\n".join(["A line of some length that does not end"] * 1 + ["Another line without any end mark here"] * 1),
         "too_few_punctuated_lines"),
        ("Home.\nDucks.\nGeese.\nThe swans glide slowly past the reeds in the evening.", "too_many_short_lines"),
        (f"{GOOD}\n" + PLAIN + f"\n{GOOD}", "duplicate_line_characters"),
        ("One.\nTwo.\nThree\nFour", "too_many_newlines"),
    ],
)  # fmt: skip
def test_each_fineweb_rule_names_itself(text: str, rule: str) -> None:
    assert rule in failed("fineweb", text)


def test_every_failing_rule_of_every_filter_is_recorded_in_order() -> None:
    document = Document(0, "duck\nduck\nduck", "s")
    build_filters({"gopher_repetition": {}, "gopher_quality": {}, "c4": {}}).apply(document)
    assert document.failed == [
        "gopher_repetition.duplicate_lines",
        "gopher_repetition.duplicate_line_characters",
        "gopher_repetition.top_2_gram",
        "gopher_quality.too_few_words",
        "gopher_quality.too_few_stop_words",
        "c4.too_few_sentences",
    ]


def test_later_filters_see_the_text_that_c4_left() -> None:
    document = Document(0, "\n".join([GOOD] * 3 + ["Menu"] * 9), "s")
    build_filters({"c4": {}, "fineweb": {"max_duplicate_line_characters": 1.0, "max_short_lines": 1.0}}).apply(document)
    assert document.failed == []


def test_thresholds_can_be_set_and_are_listed() -> None:
    chain = build_filters({"gopher_quality": {"min_words": 3, "max_mean_word_length": 12, "stop_words": ["und"]}})
    assert chain.thresholds["gopher_quality"]["min_words"] == 3
    assert chain.thresholds["gopher_quality"]["stop_words"] == ("und",)
    assert chain.thresholds["gopher_quality"]["max_words"] == 100_000


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"gopher_qualty": {}}, "filters: unknown filter 'gopher_qualty'; did you mean 'gopher_quality'?"),
        ({"zzz": {}}, "filters: unknown filter 'zzz'; known are c4, fineweb, gopher_quality, gopher_repetition"),
        ({"c4": {"min_sentence": 2}}, "filters.c4: unknown threshold 'min_sentence'; did you mean 'min_sentences'?"),
        ({"c4": {"min_sentences": "2"}}, "filters.c4.min_sentences must be int, at least 0, got '2'"),
        ({"c4": {"min_sentences": True}}, "filters.c4.min_sentences must be int, at least 0, got True"),
        ({"c4": {"min_sentences": -1}}, "filters.c4.min_sentences must be int, at least 0, got -1"),
        ({"c4": {"bad_words": "duck"}}, "filters.c4.bad_words must be list of words, got 'duck'"),
        ({"c4": {"terminal_punctuation": 1}}, "filters.c4.terminal_punctuation must be bool, got 1"),
        ({"fineweb": {"max_short_lines": "x"}}, "filters.fineweb.max_short_lines must be float, at least 0, got 'x'"),
    ],
)
def test_a_wrong_filter_section_says_what_would_be_right(section: dict, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        build_filters(section)
    assert str(raised.value) == message


def test_all_problems_of_the_section_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        build_filters({"c5": {}, "c4": {"a": 1, "b": 2}})
    assert len(str(raised.value).splitlines()) == 3


def test_a_view_cuts_text_into_tokens_once() -> None:
    view = TextView("It's 3% of _x_, isn\u2019t it?")
    assert view.tokens == ["It's", "3", "%", "of", "_x_", ",", "isn\u2019t", "it", "?"]
    assert view.tokens is view.tokens
    assert view.n_words == 6


def test_thresholds_are_frozen() -> None:
    limits_type, _ = FILTERS["c4"]
    limits = limits_type()
    assert replace(limits, min_sentences=5).min_sentences == 5
    with pytest.raises(AttributeError):
        limits.min_sentences = 5
