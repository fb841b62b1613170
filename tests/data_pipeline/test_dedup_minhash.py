import random

import numpy as np
import pytest

from data_pipeline.dedup.minhash import MinHasher, normalise


def words(rng: random.Random, n: int) -> list[str]:
    return [f"w{rng.randrange(50_000)}" for _ in range(n)]


def jaccard(a: str, b: str, n: int) -> float:
    """The definition, on the shingles themselves."""
    x, y = ({tuple(w[i : i + n]) for i in range(len(w) - n + 1)} for w in (normalise(a).split(), normalise(b).split()))
    return len(x & y) / len(x | y)


def pair_of_similarity(rng: random.Random, target: float, n_words: int = 600) -> tuple[str, str]:
    """Two texts with a common beginning: of m single-word shingles each, c common: J = c / (2m - c)."""
    common = round(2 * n_words * target / (1 + target))
    shared = words(rng, common)
    return " ".join(shared + words(rng, n_words - common)), " ".join(shared + words(rng, n_words - common))


def test_normalised_text_is_lower_case_words_joined_by_one_space():
    assert normalise("  Hello,\n\tWORLD--it's  2 a.m. ") == "hello world it s 2 a m"


@pytest.mark.parametrize("target", [0.2, 0.5, 0.8])
def test_share_of_equal_minima_estimates_the_jaccard_similarity_of_shingles(target: float):
    rng = random.Random(1)
    a, b = pair_of_similarity(rng, target)
    truth = jaccard(a, b, 5)
    _, signatures = MinHasher(ngram=5, bands=64, rows=16).signatures([a, b])
    estimate = (signatures[0] == signatures[1]).mean()
    # Standard deviation of 1,024 draws; 4 of them.
    assert abs(estimate - truth) < 4 * (truth * (1 - truth) / 1024) ** 0.5


def test_identical_texts_have_identical_signatures_and_unrelated_ones_share_almost_none():
    rng = random.Random(2)
    text, other = " ".join(words(rng, 300)), " ".join(words(rng, 300))
    _, s = MinHasher(5, 14, 8).signatures([text, text, other])
    assert (s[0] == s[1]).all()
    assert (s[0] == s[2]).mean() < 0.05


@pytest.mark.parametrize("similarity", [0.6, 0.72, 0.85])
def test_probability_of_a_common_band_follows_the_formula_of_14_bands_of_8_rows(similarity: float):
    rng = random.Random(3)
    hasher = MinHasher(ngram=1, bands=14, rows=8)
    n_pairs = 300
    texts = [text for _ in range(n_pairs) for text in pair_of_similarity(rng, similarity, 200)]
    true = np.array([jaccard(texts[i], texts[i + 1], 1) for i in range(0, len(texts), 2)])
    _, signatures = hasher.signatures(texts)
    keys = hasher.band_keys(signatures)
    found = (keys[::2] == keys[1::2]).any(axis=1).mean()
    expected = (1 - (1 - true**8) ** 14).mean()
    assert abs(found - expected) < 4 * (expected * (1 - expected) / n_pairs) ** 0.5 + 0.01


def test_documents_shorter_than_the_ngram_have_no_signature():
    positions, signatures = MinHasher(5, 2, 2).signatures(["a b c d", "", "a b c d e", "a b c d e f"])
    assert positions.tolist() == [2, 3]
    assert signatures.shape == (2, 4)


def test_a_signature_does_not_depend_on_what_else_is_in_the_batch():
    rng = random.Random(4)
    texts = [" ".join(words(rng, rng.randint(5, 80))) for _ in range(30)]
    hasher = MinHasher(5, 14, 8)
    _, together = hasher.signatures(texts)
    alone = np.concatenate([hasher.signatures([text])[1] for text in texts])
    assert np.array_equal(together, alone)


def test_shingles_depend_on_the_order_of_words():
    _, s = MinHasher(3, 14, 8).signatures(["one two three", "three two one"])
    assert (s[0] != s[1]).all()


def test_equal_minima_in_different_bands_give_different_keys():
    keys = MinHasher(5, 2, 3).band_keys(np.array([[7, 8, 9, 7, 8, 9]], np.uint32))
    assert keys[0, 0] != keys[0, 1]
