"""The compiled way to tiktoken's ids: the same pieces and the same tokens as tiktoken itself, for any text."""

from __future__ import annotations

import itertools
import random
import string
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str

from data_pipeline.dedup.signatures import utf8_of
from data_pipeline.encode import encode_column
from data_pipeline.fast_bpe import FastBpe, character_classes
from data_pipeline.tokenizer_training import train_bpe
from megagpt.byte_bpe import GPT2_PATTERN, SINGLE_DIGITS_PATTERN, THREE_DIGITS_PATTERN
from megagpt.errors import DataError
from megagpt.tokenizer import TiktokenTokenizer, open_tokenizer

PATTERNS = [GPT2_PATTERN, SINGLE_DIGITS_PATTERN, THREE_DIGITS_PATTERN]
EOT = "<|endoftext|>"
BYTES = {bytes([byte]): byte for byte in range(256)}
ALL_WHITE_SPACE = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()]
TRICKY = [
    *ALL_WHITE_SPACE, "'", "'s", "'S", "'ll", "'l", "'ve", "'re", "'r", "\u2019s", " ", "  ",
    "\n\n", "\r\n", "\u200b", "\ufeff",
    "a", "Wörter", "слово", "中文字", "ไทย", "हिन्दी", "שלום", "e\u0301", "\u0345", "ǅ", "ᾳ", "ª", "ⅷ", "1", "1234567",
    "٣٤٥", "½", "\U0001d7d8\U0001d7d9", "一", "\u3007", "!", "...",
    "\x00", "\x1c", "\x85", "👩‍👩‍👧‍👦", "🇩🇪", "☃️", EOT, "<|", "\U000e0001",
    "\U0010ffff", "\ue000", "x" * 70, "=" * 600, " " * 66, "\t" * 520, "é" * 40, "\U00031350", "\u0cdd",
]  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(TRICKY), max_size=25).map("".join),
    st.lists(st.one_of(st.sampled_from(TRICKY), st.characters(codec="utf-8")), max_size=25).map("".join),
    st.text(alphabet="ab'stdmlvre 1\n\t!é", max_size=40),
)


def encoding_of(pattern: str, tokens: Sequence[bytes] = ()) -> tiktoken.Encoding:
    ranks = BYTES | {token: 256 + i for i, token in enumerate(dict.fromkeys(tokens)) if len(token) > 1}
    return tiktoken.Encoding("t", pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: 256 + len(ranks) * 2})


def ids_of(fast: FastBpe, texts: Sequence[str], separator: int) -> list[list[int]]:
    tokens, lengths = fast.encode(*utf8_of(pa.array(texts, pa.string())), separator)
    ends = np.cumsum(lengths)
    assert len(tokens) == lengths.sum()
    assert (tokens[ends - 1] == separator).all()
    parts = np.split(tokens, ends[:-1]) if len(ends) else []
    return [part[:-1].tolist() for part in parts]


def assert_same(encoding: tiktoken.Encoding, texts: Sequence[str], fast: FastBpe | None = None) -> None:
    fast = fast or FastBpe.of(encoding)
    assert fast is not None
    for text, ids in zip(texts, ids_of(fast, texts, 2**31), strict=True):
        assert ids == encoding.encode_ordinary(text), repr(text)


@pytest.fixture(scope="module")
def encodings(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[tiktoken.Encoding, FastBpe]]:
    """Encodings that the pipeline trains, one for each way with digits."""
    rng = random.Random(0)
    words = [*TRICKY, "the ", " quick", " don't", " we'll", "1984 ", " 12345", "function", "    return ", "naïve"]
    texts = ["".join(rng.choice(words) for _ in range(60)) for _ in range(200)]
    found = []
    for digits in ("gpt2", "single", "up_to_three"):
        path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
        train_bpe(iter(texts), 1200, digits=digits).save(str(path))  # type: ignore[arg-type]
        encoding = open_tokenizer(path).tiktoken_encoding
        fast = FastBpe.of(encoding)
        assert fast is not None
        found.append((encoding, fast))
    assert [encoding._pat_str for encoding, _ in found] == PATTERNS
    return found


def test_the_pattern_is_the_one_that_tiktoken_uses_for_gpt2():
    assert r50k_pat_str == GPT2_PATTERN


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_short_text_is_cut_as_tiktoken_cuts_it(pattern: str):
    """Every text over an alphabet with all kinds of characters; every text is a token, so that each cut shows."""
    alphabet = "asl1'! \né"
    texts = ["".join(letters) for n in range(6) for letters in itertools.product(alphabet, repeat=n)]
    assert_same(encoding_of(pattern, [text.encode() for text in texts[1:]]), texts)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_contractions_are_cut_as_tiktoken_cuts_them(pattern: str):
    letters = string.ascii_letters + "'{\u017f1 "
    texts = [f"{a}'{b}{c}" for a in ("", "x", " ") for b in letters for c in letters]
    pieces = [text[i:j].encode() for text in texts for i, j in itertools.combinations(range(len(text) + 1), 2)]
    assert_same(encoding_of(pattern, pieces), texts)


def test_every_class_of_characters_is_that_of_tiktoken():
    """Neighbours of each kind before a character, each pair a token: a cut between them shows."""
    classes = character_classes()
    borders = np.flatnonzero(np.diff(classes)).tolist()
    codes = {*range(0x250), *range(0, 0x110000, 101), *borders, *(code + 1 for code in borders)}
    characters = [chr(code) for code in sorted(codes) if not 0xD800 <= code < 0xE000]
    texts = [before + character for character in characters for before in "a1!\t "]
    assert_same(encoding_of(GPT2_PATTERN, [text.encode() for text in texts]), texts)
    followed = [character + after for character in characters for after in "a1!\t "]
    assert_same(encoding_of(SINGLE_DIGITS_PATTERN, [text.encode() for text in followed]), followed)


def test_classes_are_those_of_unicode_as_python_knows_it():
    """Its Unicode version may be another: characters that one of them does not know yet are few."""
    classes = character_classes()
    kinds = np.array([chr(code).isalpha() + 3 * chr(code).isspace() for code in range(0x110000)])
    kinds[0x1C:0x20] = 0  # white space in Python only
    assert np.count_nonzero((kinds == 1) != (classes == 1)) < 10_000
    assert np.array_equal(kinds == 3, classes == 3)
    assert not classes[0xD800:0xE000].any()


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4))
@example(texts=["", " ", "\n", " \n", "x \n", "'", "a'", "''s", " 's", "1" * 9, " 1 22  333"])
@example(texts=["=" * 64, "=" * 65, "=" * 512, "=" * 513, "a" * 5000 + " " * 5000 + "b", "=" * 700 + "\n" + "=" * 700])
def test_any_text_gets_the_ids_of_tiktoken(texts: list[str], encodings: list[tuple[tiktoken.Encoding, FastBpe]]):
    for encoding, fast in encodings:
        assert_same(encoding, texts, fast)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), texts=st.lists(st.text(alphabet="abc ", max_size=150), min_size=1, max_size=5))
def test_any_vocabulary_is_merged_as_tiktoken_merges_it(data: st.DataObject, texts: list[str]):
    """Tokens in any order, reachable or not."""
    tokens = data.draw(st.lists(st.text(alphabet="abc ", min_size=2, max_size=20).map(str.encode), max_size=40))
    encoding = encoding_of(GPT2_PATTERN, tokens)
    assert_same(encoding, texts, FastBpe.of(encoding, cache_rows=16))


@pytest.mark.parametrize("cache_rows", [2, 64])
def test_a_cache_that_is_full_changes_nothing(cache_rows: int, encodings: list[tuple[tiktoken.Encoding, FastBpe]]):
    rng = random.Random(1)
    texts = ["".join(rng.choice(TRICKY) for _ in range(30)) for _ in range(60)]
    encoding, roomy = encodings[0]
    small = FastBpe.of(encoding, cache_rows)
    assert small is not None
    assert_same(encoding, texts, small)
    one_by_one = [ids_of(small, [text], 7) for text in texts]
    assert [ids for [ids] in one_by_one] == ids_of(roomy, texts, 7)


def test_installed_files_get_the_ids_of_tiktoken(encodings: list[tuple[tiktoken.Encoding, FastBpe]]):
    root = Path(sysconfig.get_paths()["purelib"])
    files = [
        path for name in ("numpy", "pyarrow", "tokenizers", "pygments") for path in sorted((root / name).rglob("*.py"))
    ]
    texts = [path.read_text(encoding="utf-8") for path in files[::7]]
    assert len(texts) > 50
    for encoding, fast in encodings:
        assert_same(encoding, texts, fast)


def test_a_slice_of_an_array_is_encoded_as_such(encodings: list[tuple[tiktoken.Encoding, FastBpe]]):
    encoding, fast = encodings[0]
    tokenizer = TiktokenTokenizer(encoding)
    texts = pa.array(["one", "", f"two {EOT}", "drei", "=" * 600, "fünf"])
    for array in (texts.slice(1, 4), texts.slice(0, 0), pa.array([], pa.string()), texts.cast(pa.large_string())):
        tokens, lengths = encode_column(tokenizer, fast, array)
        slow_tokens, slow_lengths = encode_column(tokenizer, None, array)
        assert tokens.tolist() == slow_tokens.tolist()
        assert lengths.tolist() == slow_lengths.tolist()


def test_an_encoding_that_is_not_known_is_left_to_tiktoken():
    assert FastBpe.of(None) is None
    assert FastBpe.of(encoding_of(r"\w+|\W+")) is None
    lacking = {token: rank for token, rank in BYTES.items() if rank != 65}
    assert FastBpe.of(tiktoken.Encoding("t", pat_str=GPT2_PATTERN, mergeable_ranks=lacking, special_tokens={})) is None


def test_a_text_that_makes_the_separator_is_an_error():
    encoding = tiktoken.Encoding("t", pat_str=GPT2_PATTERN, mergeable_ranks=BYTES, special_tokens={EOT: ord("!")})
    with pytest.raises(DataError, match=r"own separator, token 33, in it, so the document 'Oh! No'"):
        encode_column(TiktokenTokenizer(encoding), FastBpe.of(encoding), pa.array(["a", "Oh! No", "b!"]))
