"""A tokenizer.json through tiktoken: the same ids, or not at all."""

from __future__ import annotations

import json
import random

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import pre_tokenizers

from data_pipeline.tokenizer_training import train_bpe
from megagpt.byte_bpe import byte_letters, equal_encoding

DIGITS = ("gpt2", "single", "up_to_three")
ALPHABET = "abcdeABC'stlve \n\t\r 0123456789²٣ⅷ.,!?<|>éß中😀\u00a0\u2003\u200b\u0301"
SPECIALS = ["<|user|>"]


def trained(digits: str, seed: int = 0, letters: str = ALPHABET, size: int = 700) -> RustTokenizer:
    rng = random.Random(seed)
    words = ["".join(rng.choices(letters, k=rng.randint(1, 8))) for _ in range(300)]
    texts = ["".join(rng.choices(words, k=40)) for _ in range(200)]
    tokenizer = train_bpe(iter(texts), size, SPECIALS, digits)
    tokenizer.encode_special_tokens = True
    return tokenizer


def ids(encoding: tiktoken.Encoding, text: str) -> list[int]:
    return encoding.encode_to_numpy(text, allowed_special=frozenset(), disallowed_special=()).tolist()


PAIRS: dict[str, tuple[RustTokenizer, tiktoken.Encoding]] = {}


def pair(digits: str) -> tuple[RustTokenizer, tiktoken.Encoding]:
    if digits not in PAIRS:
        tokenizer = trained(digits)
        PAIRS[digits] = (tokenizer, equal_encoding(tokenizer))
    return PAIRS[digits]


@pytest.mark.parametrize("digits", DIGITS)
@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(ALPHABET, max_size=60), st.text(max_size=60)))
def test_every_text_gets_the_same_ids(digits, text):
    tokenizer, encoding = pair(digits)
    for variant in (text, f"{text}<|user|>{text}<|endoftext|>"):
        assert ids(encoding, variant) == tokenizer.encode(variant, add_special_tokens=False).ids


@pytest.mark.parametrize("seed", range(6))
def test_so_do_texts_of_few_letters_whose_merges_overlap(seed):
    tokenizer = trained("gpt2", seed, "ab" if seed % 2 else "aab ", 600)
    encoding = equal_encoding(tokenizer)
    assert encoding is not None
    rng = random.Random(seed)
    short = ["".join(rng.choices("ab ", k=rng.randint(0, 80))) for _ in range(500)]
    for text in [*short, "".join(rng.choices("ab", k=5000)), "a" * 4001, "ab" * 2001]:
        assert ids(encoding, text) == tokenizer.encode(text).ids


@pytest.mark.parametrize("digits", DIGITS)
def test_each_character_is_cut_off_from_its_neighbours_alike(digits):
    """Two libraries, two tables of Unicode: all up to U+3000, then every 37th, beside every kind of neighbour."""
    tokenizer, encoding = pair(digits)
    for code in [*range(1, 0x3000), *range(0x3000, 0x110000, 37)]:
        if not 0xD800 <= code < 0xE000:
            text = "a{0}a 1{0}1 !{0}! {0}{0} ".format(chr(code))
            assert ids(encoding, text) == tokenizer.encode(text).ids, hex(code)


def changed(tokenizer: RustTokenizer, change) -> RustTokenizer:
    content = json.loads(tokenizer.to_str())
    change(content)
    found = RustTokenizer.from_str(json.dumps(content))
    found.encode_special_tokens = True
    return found


def swap_last_ids(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    last, before = sorted(vocabulary, key=vocabulary.__getitem__)[-1:-3:-1]
    vocabulary[last], vocabulary[before] = vocabulary[before], vocabulary[last]


def add_unmergeable(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["zzzz"] = len(vocabulary)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["pre_tokenizer"].update(add_prefix_space=True),
        lambda content: content["pre_tokenizer"].update(use_regex=False),
        lambda content: content["model"].update(ignore_merges=True),
        lambda content: content["model"].update(dropout=0.1),
        lambda content: content.update(normalizer={"type": "NFC"}),
        lambda content: content.update(pre_tokenizer=None),
        lambda content: content["added_tokens"][1].update(special=False),
        swap_last_ids,
        add_unmergeable,
    ],
)
def test_a_file_that_asks_for_anything_else_has_no_equal(change):
    tokenizer, _ = pair("gpt2")
    assert equal_encoding(tokenizer) is not None
    assert equal_encoding(changed(tokenizer, change)) is None


def test_a_token_that_its_own_bytes_do_not_give_has_no_equal():
    """`bc` is merged first, so `ab` and `c` never meet; tiktoken would make `abc` of `a` and `bc`."""

    def merges(content: dict) -> None:
        model = content["model"]
        model["vocab"] = {"<|endoftext|>": 0, **{letter: 1 + i for i, letter in enumerate(byte_letters())}}
        model["merges"] = [["b", "c"], ["a", "b"], ["ab", "c"]]
        model["vocab"] |= {"bc": 257, "ab": 258, "abc": 259}
        content["added_tokens"] = content["added_tokens"][:1]

    tokenizer = changed(pair("gpt2")[0], merges)
    assert tokenizer.encode("abc").tokens == ["a", "bc"]
    assert equal_encoding(tokenizer) is None


def test_the_letters_of_bytes_are_those_of_the_library():
    assert set(byte_letters()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_letters().values()) == list(range(256))
    for byte in range(128):
        (piece, _), *_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(byte))
        assert byte_letters()[piece] == byte
