import random
from dataclasses import MISSING, fields, replace

import pytest

from data_pipeline.document import Document
from data_pipeline.filters.registry import FILTERS, build_filters, files_of
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


def needs_a_file(settings: type) -> bool:
    return any(field.default is MISSING and field.default_factory is MISSING for field in fields(settings))


@pytest.mark.parametrize("name", sorted(name for name, (kind, _) in FILTERS.items() if not needs_a_file(kind)))
def test_plain_prose_passes_every_filter_unchanged(name: str) -> None:
    document = Document(0, PLAIN, "s")
    build_filters({name: {}}).apply(document)
    assert (document.failed, document.text) == ([], PLAIN)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("The duck and the pond.", "min_words"),
        ("the and " * 50_001, "max_words"),
        ("I be to a of it in we he of and that so to at on " * 4, "min_mean_word_length"),
        ("the and " + "internationalisation " * 60, "max_mean_word_length"),
        (PLAIN + " #tag" * 14, "max_hash_per_word"),
        (PLAIN.replace(".", " ... ... ..."), "max_ellipsis_per_word"),
        (PLAIN.replace(".", "…").replace("\n", "… …\n"), "max_ellipsis_per_word"),
        ("\n".join(f"- {line}" for line in PLAIN.split("\n")), "max_bullet_lines"),
        ("\n".join(f"  • {line}" for line in PLAIN.split("\n")), "max_bullet_lines"),
        (PLAIN.replace(".\n", "...\n"), "max_ellipsis_lines"),
        (PLAIN + " 12 34 5,6" * 10, "min_alphabetic_words"),
        (PLAIN.replace("The", "A").replace("and", "und"), "min_stop_words"),
    ],
)
def test_each_gopher_quality_rule_names_itself(text: str, rule: str) -> None:
    assert rule in failed("gopher_quality", text)


def test_gopher_quality_counts_words_without_punctuation_at_the_boundary() -> None:
    fifty = "the of " + " ".join(["duck"] * 48)
    assert failed("gopher_quality", fifty) == []
    assert failed("gopher_quality", fifty.removesuffix(" duck") + " ! ? ; :") == ["min_words"]


def test_an_empty_text_is_no_division_by_zero() -> None:
    for text in ("", " \n\n ", "\n"):
        assert failed("gopher_quality", text) == ["min_words", "min_stop_words"]
        assert failed("gopher_quality", text, min_words=0, min_stop_words=0) == []
        assert failed("gopher_repetition", text) == []
        assert failed("fineweb", text) == ["min_punctuated_lines"]
        assert failed("c4", text) == ["min_sentences"]


BIRDS = "Swans glide slowly past reeds.\nGeese honk loudly at strangers.\nHerons wait quietly for fish."


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("Duck\nDuck\n" + BIRDS.split("\n")[0], "max_duplicate_lines"),  # 1 of 3 lines
        ("\n\n".join(["Duck", "Duck", "Goose"]), "max_duplicate_paragraphs"),
        (f"{BIRDS}\n{BIRDS.split(chr(10))[1]}", "max_duplicate_line_characters"),  # 32 of 124 characters
        (f"{BIRDS}\n\n{BIRDS}", "max_duplicate_paragraph_characters"),
        ("buy ducks " * 3 + BIRDS[:30], "max_top_2_gram"),
        ("buy white ducks " * 2 + BIRDS, "max_top_3_gram"),
        ("buy white ducks now " * 2 + BIRDS + BIRDS[:40], "max_top_4_gram"),
    ],
)
def test_each_gopher_repetition_rule_names_itself(text: str, rule: str) -> None:
    assert rule in failed("gopher_repetition", text)


@pytest.mark.parametrize("n", range(5, 11))
def test_each_duplicate_ngram_rule_has_its_own_threshold(n: int) -> None:
    # Ten words of five characters, said again: half of all characters but the spaces are repeated.
    words = [f"dck{number:02}" for number in range(10)]
    text = " ".join(words + words)
    assert f"max_duplicate_{n}_grams" in failed("gopher_repetition", text)
    share = {5: 50, 10: 50, 6: 30, 7: 35, 8: 40, 9: 45}[n] / len(text)
    limit = f"max_duplicate_{n}_grams"
    assert f"max_duplicate_{n}_grams" not in failed("gopher_repetition", text, **{limit: share + 1e-6})
    assert f"max_duplicate_{n}_grams" in failed("gopher_repetition", text, **{limit: share - 1e-6})


def test_a_short_text_that_repeats_nothing_passes_gopher_repetition() -> None:
    assert failed("gopher_repetition", "The quick brown fox jumps over") == []


def test_blank_lines_are_no_duplicate_lines() -> None:
    assert failed("gopher_repetition", BIRDS.replace("\n", "\n\n\n\n")) == []


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
    assert failed("c4", "\n".join([four] * 3)) == ["min_sentences"]
    assert failed("c4", "\n".join([five] * 2)) == ["min_sentences"]
    assert failed("c4", f"{five} {five} {five}") == []


@pytest.mark.parametrize(
    ("text", "limits", "rule"),
    [
        (f"{GOOD}\n" * 3 + "Lorem ipsum dolor sit amet now.", {}, "max_lorem_ipsum"),
        (f"{GOOD}\n" * 3 + "if (duck) { swim on a pond }.", {}, "max_curly_brackets"),
        (f"{GOOD}\n" * 7700, {}, "max_page_characters"),
    ],
)
def test_each_c4_page_rule_names_itself(text: str, limits: dict[str, object], rule: str) -> None:
    assert failed("c4", text, **limits) == [rule]


def test_c4_removes_citation_marks() -> None:
    document = Document(0, "\n".join(["The duck[1] swims[citation needed] on a pond.[23]"] * 3), "s")
    build_filters({"c4": {}}).apply(document)
    assert document.text.split("\n")[0] == GOOD


@pytest.mark.parametrize(
    ("text", "n"),
    [("One. Two! Three?", 3), ('He said "Go." Then left.', 2), ("Version 3.5 is out.", 1), ("No end", 1), ("", 0)],
)
def test_sentences_are_counted_by_their_ends(text: str, n: int) -> None:
    assert TextView(text).n_sentences == n


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("\n".join(["A line of some length that does not end"] * 1 + ["Another line without any end mark here"] * 1),
         "min_punctuated_lines"),
        ("Home.\nDucks.\nGeese.\nThe swans glide slowly past the reeds in the evening.", "max_short_lines"),
        (f"{GOOD}\n" + PLAIN + f"\n{GOOD}", "max_duplicate_line_characters"),
        ("One.\nTwo.\nThree\nFour", "max_newlines_per_word"),
    ],
)  # fmt: skip
def test_each_fineweb_rule_names_itself(text: str, rule: str) -> None:
    assert rule in failed("fineweb", text)


def test_every_failing_rule_of_every_filter_is_recorded_in_order() -> None:
    document = Document(0, "duck\nduck\nduck", "s")
    build_filters({"gopher_repetition": {}, "gopher_quality": {}, "c4": {}}).apply(document)
    assert document.failed == [
        "gopher_repetition.max_duplicate_lines",
        "gopher_repetition.max_duplicate_line_characters",
        "gopher_repetition.max_top_2_gram",
        "gopher_quality.min_words",
        "gopher_quality.min_stop_words",
        "c4.min_sentences",
    ]


def test_later_filters_see_the_text_that_c4_left() -> None:
    document = Document(0, "\n".join([GOOD] * 3 + ["Menu"] * 9), "s")
    build_filters({"c4": {}, "fineweb": {"max_duplicate_line_characters": 1.0, "max_short_lines": 1.0}}).apply(document)
    assert document.failed == []


# The published numbers, written down here a second time: Rae et al. 2021, appendix A.1.1 and table A1; c4_utils.py of
# tensorflow/datasets; datatrove's fineweb_quality_filter.py; DCLM's dclm_baseline_refinedweb.yaml.
PUBLISHED = {
    "gopher_quality": {
        **{"min_words": 50, "max_words": 100_000, "min_mean_word_length": 3, "max_mean_word_length": 10},
        **{"max_hash_per_word": 0.1, "max_ellipsis_per_word": 0.1, "max_bullet_lines": 0.9, "max_ellipsis_lines": 0.3},
        **{"min_alphabetic_words": 0.8, "min_stop_words": 2},
        "stop_words": ("the", "be", "to", "of", "and", "that", "have", "with"),
        "shares_of": "spaced",
    },
    "gopher_repetition": {
        **{"max_duplicate_lines": 0.3, "max_duplicate_paragraphs": 0.3},
        **{"max_duplicate_line_characters": 0.2, "max_duplicate_paragraph_characters": 0.2},
        **{"max_top_2_gram": 0.2, "max_top_3_gram": 0.18, "max_top_4_gram": 0.16},
        **{f"max_duplicate_{n}_grams": round(0.2 - n / 100, 2) for n in range(5, 11)},
    },
    "c4": {
        **{"max_lorem_ipsum": 0, "max_curly_brackets": 0, "max_page_characters": 190_000, "min_sentences": 3},
        **{"words_per_line": 5, "word_characters": 1000, "terminal_punctuation": True},
    },
    "fineweb": {
        **{"min_punctuated_lines": 0.12, "max_short_lines": 0.67, "short_line_characters": 30},
        **{"max_duplicate_line_characters": 0.01, "max_newlines_per_word": 0.3},
    },
    "dclm": {
        **{"max_removed_words": 0.05, "uppercase_characters": 0.5, "words_per_line": 2, "phrase_line_words": 10},
    },
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_defaults_are_the_published_numbers(name: str) -> None:
    assert build_filters({name: {}}).thresholds[name] == PUBLISHED[name]


def test_every_measure_of_every_filter_is_recorded_under_its_column() -> None:
    chain = build_filters({name: {} for name in PUBLISHED})
    for text in (PLAIN, "", "duck"):
        document = Document(0, text, "s")
        chain.apply(document)
        assert tuple(document.measures) == chain.measure_names
    assert "c4.removed_lines" in chain.measure_names
    assert "gopher_quality.mean_word_length" in chain.measure_names
    assert len(set(chain.measure_names)) == len(chain.measure_names) == 8 + 13 + 5 + 4 + 2


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_null_switches_each_rule_off_and_leaves_its_measure(name: str) -> None:
    rules = [key for key in PUBLISHED[name] if key.startswith(("min_", "max_"))]
    document = Document(0, "duck\nduck\nduck", "s")
    chain = build_filters({name: dict.fromkeys(rules)})
    chain.apply(document)
    assert document.failed == []
    assert set(document.measures) == set(chain.measure_names)


def test_a_share_at_its_threshold_passes_although_it_is_no_binary_fraction() -> None:
    three_of_ten = "\n".join([*["Duck"] * 4, *(f"Goose {number}" for number in range(6))])
    document = Document(0, three_of_ten, "s")
    build_filters({"gopher_repetition": {}}).apply(document)
    assert document.measures["gopher_repetition.duplicate_lines"] == pytest.approx(0.3)
    assert "gopher_repetition.max_duplicate_lines" not in document.failed


def test_filters_name_the_files_that_they_read() -> None:
    assert files_of({"gopher_quality": {}, "c4": {}}) == []


def test_fineweb_takes_every_sign_for_a_word() -> None:
    text = " ".join(["the, and, duck;"] * 20)
    assert failed("gopher_quality", text) == []
    assert failed("gopher_quality", text, shares_of="tokens") == ["min_alphabetic_words"]


def test_thresholds_can_be_set_and_are_listed() -> None:
    chain = build_filters({"gopher_quality": {"min_words": 3, "max_mean_word_length": 12, "stop_words": ["und"]}})
    assert chain.thresholds["gopher_quality"]["min_words"] == 3
    assert chain.thresholds["gopher_quality"]["stop_words"] == ("und",)
    assert chain.thresholds["gopher_quality"]["max_words"] == 100_000


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"gopher_qualty": {}}, "filters: unknown filter 'gopher_qualty'; did you mean 'gopher_quality'?"),
        ({"zzz": {}}, f"filters: unknown filter 'zzz'; known are {', '.join(sorted(FILTERS))}"),
        ({"c4": {"min_sentence": 2}}, "filters.c4: unknown threshold 'min_sentence'; did you mean 'min_sentences'?"),
        ({"c4": {"min_sentences": "2"}}, "filters.c4.min_sentences must be int, at least 0, or null, got '2'"),
        ({"c4": {"min_sentences": True}}, "filters.c4.min_sentences must be int, at least 0, or null, got True"),
        ({"c4": {"min_sentences": -1}}, "filters.c4.min_sentences must be int, at least 0, or null, got -1"),
        ({"c4": {"words_per_line": None}}, "filters.c4.words_per_line must be int, at least 0, got None"),
        (
            {"gopher_quality": {"stop_words": "the"}},
            "filters.gopher_quality.stop_words must be list of words, got 'the'",
        ),
        (
            {"gopher_quality": {"min_words": 9, "max_words": 8}},
            "filters.gopher_quality.min_words is 9, above max_words = 8; no document could pass",
        ),
        ({"c4": {"terminal_punctuation": 1}}, "filters.c4.terminal_punctuation must be bool, got 1"),
        (
            {"fineweb": {"max_short_lines": "x"}},
            "filters.fineweb.max_short_lines must be float, at least 0, or null, got 'x'",
        ),
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
    assert view.words.n_words == 6


def test_thresholds_are_frozen() -> None:
    limits_type, _ = FILTERS["c4"]
    limits = limits_type()
    assert replace(limits, min_sentences=5).min_sentences == 5
    with pytest.raises(AttributeError):
        limits.min_sentences = 5
