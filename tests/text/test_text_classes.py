import re

import numpy as np

from megagpt.text.text_classes import N_CODE_POINTS, is_word_character, lower_case, word_lower_case


def test_word_characters_are_those_of_the_regular_expression():
    table = is_word_character()
    found = set(re.findall(r"\w", "".join(map(chr, range(N_CODE_POINTS)))))
    assert found == set(map(chr, np.flatnonzero(table).tolist()))


def test_lower_case_is_that_of_python_but_for_the_dotted_i_and_the_sigmas():
    table = lower_case()
    different = {chr(c): chr(table[c]) for c in range(N_CODE_POINTS) if chr(table[c]) != chr(c).lower()}
    assert different == {"\u0130": "i", "\u03c2": "\u03c3"}


def test_lower_case_makes_no_word_character_of_another_and_none_of_a_word_character():
    words = is_word_character()
    assert np.array_equal(words, words[lower_case()])
    assert np.array_equal(word_lower_case() != 0, words)


def test_lower_case_takes_at_most_one_and_a_half_times_the_bytes():
    size = np.array([1, 2, 3, 4])[np.searchsorted([0x80, 0x800, 0x10000], np.arange(N_CODE_POINTS), side="right")]
    lower_size = np.array([1, 2, 3, 4])[np.searchsorted([0x80, 0x800, 0x10000], lower_case(), side="right")]
    assert (lower_size / size).max() == 1.5


def test_the_tables_cannot_be_written_to():
    assert not any(table().flags.writeable for table in (is_word_character, lower_case, word_lower_case))
