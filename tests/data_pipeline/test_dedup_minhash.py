import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dedup.minhash import MinHasher, Signer, shingle_set
from tests.data_pipeline.dedup_oracle import (
    band_keys_of,
    content_hash_of,
    jaccard_of,
    minima_of,
    shingles_of,
    utf8,
    words_of,
)

# Letters of one to four bytes, letters whose lower case is longer or shorter, signs, and enough spaces to make words.
characters = st.one_of(
    st.sampled_from(
        list("aAbZ_09 \n\t.,-'\u00c4\u00e9\u0130\u0131\u03a3\u03c2\u03c3\u212a\u023a\u1e9e\u4e2d\u0301\u0660")
    ),
    st.characters(exclude_categories=["Cs"]),
)
texts = st.lists(st.text(characters, max_size=40), max_size=6)
hashers = st.builds(MinHasher, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


def words(rng: random.Random, n: int) -> list[str]:
    return [f"w{rng.randrange(50_000)}" for _ in range(n)]


def minima(texts: list[str], hasher: MinHasher) -> np.ndarray:
    return Signer(hasher).sign(*utf8(texts)).minima


def pair_of_similarity(rng: random.Random, target: float, n_words: int = 600) -> tuple[str, str]:
    """Two texts with a common beginning: of m single-word shingles each, c common: J = c / (2m - c)."""
    common = round(2 * n_words * target / (1 + target))
    shared = words(rng, common)
    return " ".join(shared + words(rng, n_words - common)), " ".join(shared + words(rng, n_words - common))


def test_texts_are_equal_in_content_if_their_lower_case_words_are():
    texts = ["  Hello,\n\tWORLD--it's  2 a.m. \u0130stanbul \u039f\u0394\u039f\u03a3"]
    texts.append("hello world it s 2 a m istanbul \u03bf\u03b4\u03bf\u03c2")
    texts.append("hello world its 2 a m istanbul \u03bf\u03b4\u03bf\u03c2")
    hashes = Signer(None).sign(*utf8(texts)).content_hashes
    assert hashes[0] == hashes[1] != hashes[2]


@given(texts, hashers)
@settings(max_examples=300, deadline=None)
def test_every_hash_is_bit_equal_to_its_definition_in_plain_python(texts: list[str], hasher: MinHasher):
    signed = Signer(hasher).sign(*utf8(texts))
    assert signed.content_hashes == [content_hash_of(text) for text in texts]
    assert signed.n_words.tolist() == [len(words_of(text)) for text in texts]
    for i, text in enumerate(texts):
        expected = minima_of(text, hasher)
        if expected is not None:
            assert signed.minima[i].tolist() == expected
            assert signed.band_keys[i].tolist() == band_keys_of(expected, hasher)


@given(st.text(characters, max_size=60), st.integers(1, 4))
@settings(deadline=None)
def test_the_shingle_set_is_that_of_the_signature(text: str, ngram: int):
    found = shingle_set(np.frombuffer(text.encode(), np.uint8), ngram)
    assert found.tolist() == sorted(set(shingles_of(text, ngram)))


def test_a_text_longer_than_any_buffer_is_signed_as_its_definition_says():
    hasher = MinHasher(5, 2, 2)
    text = " ".join(words(random.Random(5), 5000))
    assert minima([text], hasher)[0].tolist() == minima_of(text, hasher)
    grows = "\u023a" * 1000
    assert Signer(None).sign(*utf8([grows])).content_hashes == [content_hash_of(grows)]


def test_bytes_that_are_cut_within_a_character_are_read_to_their_end_and_not_beyond():
    data = np.frombuffer("word \u4e2d".encode()[:-1] + b"XYZ", np.uint8)
    signed = Signer(None).sign(data, np.array([0, len(data) - 3]))
    assert signed.n_words.tolist() == [1]


@pytest.mark.parametrize("target", [0.2, 0.5, 0.8])
def test_share_of_equal_minima_estimates_the_jaccard_similarity_of_shingles(target: float):
    rng = random.Random(1)
    a, b = pair_of_similarity(rng, target)
    truth = jaccard_of(a, b, 5)
    signatures = minima([a, b], MinHasher(ngram=5, bands=64, rows=16))
    estimate = (signatures[0] == signatures[1]).mean()
    # Standard deviation of 1,024 draws; 4 of them.
    assert abs(estimate - truth) < 4 * (truth * (1 - truth) / 1024) ** 0.5


def test_identical_texts_have_identical_signatures_and_unrelated_ones_share_almost_none():
    rng = random.Random(2)
    text, other = " ".join(words(rng, 300)), " ".join(words(rng, 300))
    s = minima([text, text, other], MinHasher(5, 14, 8))
    assert (s[0] == s[1]).all()
    assert (s[0] == s[2]).mean() < 0.05


@pytest.mark.parametrize("similarity", [0.6, 0.72, 0.85])
def test_probability_of_a_common_band_follows_the_formula_of_14_bands_of_8_rows(similarity: float):
    rng = random.Random(3)
    n_pairs = 1000
    texts = [text for _ in range(n_pairs) for text in pair_of_similarity(rng, similarity, 200)]
    true = np.array([jaccard_of(texts[i], texts[i + 1], 1) for i in range(0, len(texts), 2)])
    keys = Signer(MinHasher(ngram=1, bands=14, rows=8)).sign(*utf8(texts)).band_keys
    found = (keys[::2] == keys[1::2]).any(axis=1).mean()
    expected = (1 - (1 - true**8) ** 14).mean()
    assert abs(found - expected) < 4 * (expected * (1 - expected) / n_pairs) ** 0.5 + 0.005


def test_a_signature_does_not_depend_on_what_else_is_in_the_batch():
    rng = random.Random(4)
    texts = [" ".join(words(rng, rng.randint(5, 80))) for _ in range(30)]
    hasher = MinHasher(5, 14, 8)
    together = minima(texts, hasher)
    alone = np.concatenate([minima([text], hasher) for text in texts])
    assert np.array_equal(together, alone)


def test_shingles_depend_on_the_order_of_words():
    s = minima(["one two three", "three two one"], MinHasher(3, 14, 8))
    assert (s[0] != s[1]).all()


def test_equal_minima_in_different_bands_give_different_keys():
    hasher = MinHasher(1, 14, 1)
    keys = Signer(hasher).sign(*utf8(["same " * 50])).band_keys
    assert len(set(keys[0].tolist())) == 14


def test_hash_functions_are_the_same_in_every_process_and_version():
    multipliers, offsets = MinHasher(5, 1, 1).functions()
    signed = Signer(MinHasher(2, 1, 2)).sign(*utf8(["The quick brown fox"]))
    assert (int(multipliers[0]), int(offsets[0])) == (6737483006486428355, 2176421068913386828)
    assert signed.band_keys.tolist() == [[9559171027696783046]]
    assert signed.content_hashes == [53423091582098897503295544287644452306]
