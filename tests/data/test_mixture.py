"""megagpt.data.mixture: which tokens sample i is made of."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config.schema import WeightedTokens
from megagpt.data.indexed import TokenFile, TokenFileWriter
from megagpt.data.manifest import Manifest, describe_file, write_manifest
from megagpt.data.mixture import Mixture, deal, open_mixture, sequential_windows
from megagpt.errors import DataError


def write(prefix: Path, n_tokens: int, first: int = 0) -> Path:
    """One document of the tokens first, first + 1, ..."""
    with TokenFileWriter(prefix, np.int32) as writer:
        writer.add_document(np.arange(first, first + n_tokens))
    return prefix


def add_manifest(prefix: Path, fingerprint: str = "f") -> Manifest:
    entry = describe_file(prefix, text_bytes=1, sources={})
    manifest = Manifest({"kind": "hf", "fingerprint": fingerprint}, {prefix.name: entry}, {}, "")
    write_manifest(prefix.parent, manifest)
    return manifest


def weighted(*parts: tuple[Path, float]) -> tuple[WeightedTokens, ...]:
    return tuple(WeightedTokens(prefix=prefix, weight=weight) for prefix, weight in parts)


def test_a_sample_is_a_window_of_the_stream_with_one_token_more(tmp_path):
    mixture = open_mixture(write(tmp_path / "t", 41), seq_len=10, seed=1)
    samples = [mixture.sample(i) for i in range(4)]
    assert all(sample.dtype == np.int64 and sample.shape == (11,) for sample in samples)
    assert sorted(sample[0] for sample in samples) == [0, 10, 20, 30]
    assert all((np.diff(sample) == 1).all() for sample in samples)


def test_windows_run_over_the_borders_of_documents(tmp_path):
    with TokenFileWriter(tmp_path / "t", np.uint16) as writer:
        for document in ([5, 6, 0], [7, 0]):
            writer.add_document(document)
    assert open_mixture(tmp_path / "t", seq_len=4, seed=1).sample(0).tolist() == [5, 6, 0, 7, 0]


def test_each_epoch_covers_each_window_once_whatever_the_order_of_access(tmp_path):
    mixture = open_mixture(write(tmp_path / "t", 1003), seq_len=10, seed=3)
    accessed = list(range(300))
    random.Random(0).shuffle(accessed)
    first_token = {i: int(mixture.sample(i)[0]) for i in accessed}
    epochs = [[first_token[i] for i in range(epoch * 100, epoch * 100 + 100)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(0, 1000, 10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])


def test_the_order_depends_on_the_seed_alone(tmp_path):
    prefix = write(tmp_path / "t", 1001)
    orders = [[int(open_mixture(prefix, 10, seed).sample(i)[0]) for i in range(100)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_any_number_of_ranks_reads_the_same_samples(tmp_path):
    """A rank reads samples rank, rank + n_ranks, ...: together they are the samples of one process."""
    files = weighted((write(tmp_path / "a", 500), 0.7), (write(tmp_path / "b", 500, 1000), 0.3))
    alone = [open_mixture(files, 8, 5).sample(i).tolist() for i in range(60)]
    for n_ranks in (2, 3, 4):
        ranks = [open_mixture(files, 8, 5) for _ in range(n_ranks)]
        assert [ranks[i % n_ranks].sample(i).tolist() for i in range(60)] == alone


def test_each_file_of_a_mixture_is_covered_once_an_epoch(tmp_path):
    files = weighted((write(tmp_path / "a", 201), 3), (write(tmp_path / "b", 101, 1000), 1))
    mixture = open_mixture(files, seq_len=10, seed=5)
    seen = [int(mixture.sample(i)[0]) for i in range(40)]
    assert sorted(token for token in seen if token >= 1000) == list(range(1000, 1100, 10))
    of_a = [token for token in seen if token < 1000]  # an epoch and a half
    assert sorted(of_a[:20]) == list(range(0, 200, 10))
    assert len(set(of_a[20:])) == 10


def test_three_to_one_is_three_to_one_in_every_four():
    counts = [0, 0]
    tree = deal([Fraction(3, 4), Fraction(1, 4)])
    mixture = bare_mixture(tree, 2)
    for i in range(400):
        counts[mixture.locate(i)[0]] += 1
        if i % 4 == 3:
            assert counts == [3 * (i + 1) // 4, (i + 1) // 4]


def bare_mixture(tree, n_files: int) -> Mixture:
    """A mixture that can say which file is next, but has none."""
    return Mixture((None,) * n_files, (), 1, 0, None, None, "", tree)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12), st.integers(0, 10**15))
@settings(max_examples=150, deadline=None)
def test_counts_stay_within_two_of_the_weights_at_any_sample(raw, n):
    weights = [Fraction(repr(weight)) for weight in raw]
    weights = [weight / sum(weights) for weight in weights]
    mixture = bare_mixture(deal(weights), len(weights))
    for samples in (n, n + 1, n % 1000):
        counts = mixture.counts(samples)
        assert sum(counts) == samples
        assert all(abs(count - samples * weight) < 2 for count, weight in zip(counts, weights, strict=True))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(0, 10**12))
@settings(max_examples=50, deadline=None)
def test_samples_of_a_file_are_numbered_without_gaps(raw, start):
    weights = [Fraction(weight, sum(raw)) for weight in raw]
    mixture = bare_mixture(deal(weights), len(raw))
    following = mixture.counts(start)
    for i in range(start, start + 60):
        file_number, k = mixture.locate(i)
        assert k == following[file_number]
        following[file_number] += 1
    assert following == mixture.counts(start + 60)


def test_the_plan_says_tokens_windows_shares_and_epochs(tmp_path):
    files = weighted((write(tmp_path / "a", 201), 0.75), (write(tmp_path / "b", 101), 0.25))
    shares = open_mixture(files, seq_len=10, seed=5).describe(80)
    assert [(s.prefix.name, s.n_tokens, s.n_documents, s.n_windows) for s in shares] == [
        ("a", 201, 1, 20),
        ("b", 101, 1, 10),
    ]
    assert [(s.share, s.n_samples, s.epochs) for s in shares] == [(0.75, 60, 3.0), (0.25, 20, 2.0)]


def test_a_file_too_small_for_one_sample_is_refused_with_both_numbers(tmp_path):
    write(tmp_path / "t", 10)
    expected = r"t\.bin: 10 tokens, but one sample needs 11 \(a sequence of 10 and the token after it\)"
    with pytest.raises(DataError, match=expected):
        open_mixture(tmp_path / "t", seq_len=10, seed=1)
    with pytest.raises(DataError, match=expected):
        sequential_windows(TokenFile.open(tmp_path / "t"), 10, 5)
    assert open_mixture(tmp_path / "t", seq_len=9, seed=1).sample(0).tolist() == list(range(10))


def test_negative_samples_do_not_exist(tmp_path):
    with pytest.raises(IndexError, match="sample -1"):
        open_mixture(write(tmp_path / "t", 100), 10, 1).sample(-1)


def test_validation_windows_are_spread_evenly_in_file_order(tmp_path):
    token_file = TokenFile.open(write(tmp_path / "t", 101))
    windows = sequential_windows(token_file, 10, 4)
    assert len(windows) == 4
    assert [windows.sample(i)[0] for i in range(4)] == [0, 20, 50, 70]  # windows 0, 2.5, 5 and 7.5 of 10, rounded down
    everything = sequential_windows(token_file, 10, 256)
    assert [everything.sample(i).tolist() for i in range(len(everything))] == [
        list(range(w, w + 11)) for w in range(0, 100, 10)
    ]
    with pytest.raises(IndexError, match="validation sample 4 of 4"):
        windows.sample(4)


def test_the_fingerprint_changes_with_all_that_samples_depend_on(tmp_path):
    a, b = write(tmp_path / "a", 200), write(tmp_path / "b", 200, 5)
    base = open_mixture(weighted((a, 0.5), (b, 0.5)), 10, 1)
    others = [
        open_mixture(weighted((b, 0.5), (a, 0.5)), 10, 1),
        open_mixture(weighted((a, 0.6), (b, 0.5)), 10, 1),
        open_mixture(weighted((a, 0.5), (b, 0.5)), 11, 1),
        open_mixture(weighted((a, 0.5), (b, 0.5)), 10, 2),
        open_mixture(a, 10, 1),
    ]
    assert len({mixture.fingerprint for mixture in [base, *others]}) == 6
    moved = write(tmp_path / "elsewhere" / "c", 200)
    add_manifest(moved)
    assert open_mixture(weighted((moved, 1), (b, 1)), 10, 1).fingerprint == base.fingerprint
    content = bytearray((tmp_path / "b.bin").read_bytes())
    content[400] ^= 1
    (tmp_path / "b.bin").write_bytes(content)
    assert open_mixture(weighted((a, 0.5), (b, 0.5)), 10, 1).fingerprint != base.fingerprint


def test_manifests_tell_the_tokenizer_and_the_largest_id(tmp_path):
    a, b = write(tmp_path / "a" / "t", 200), write(tmp_path / "b" / "t", 300)
    add_manifest(a)
    mixture = open_mixture(a, 10, 1)
    assert mixture.tokenizer == {"kind": "hf", "fingerprint": "f"}
    assert mixture.max_token_id == 199
    mixture = open_mixture(weighted((a, 1), (b, 1)), 10, 1)
    assert (mixture.tokenizer, mixture.max_token_id) == ({"kind": "hf", "fingerprint": "f"}, None)
    add_manifest(b)
    assert open_mixture(weighted((a, 1), (b, 1)), 10, 1).max_token_id == 299


def test_files_of_different_tokenizers_are_not_mixed(tmp_path):
    a, b = write(tmp_path / "a" / "t", 200), write(tmp_path / "b" / "t", 300)
    add_manifest(a, "1111")
    add_manifest(b, "2222")
    with pytest.raises(DataError, match=r"b/t was made with another tokenizer than .*a/t: .*2222 and .*1111"):
        open_mixture(weighted((a, 1), (b, 1)), 10, 1)


def test_token_files_that_are_not_the_manifests_are_refused(tmp_path):
    prefix = write(tmp_path / "t", 200)
    manifest = add_manifest(prefix)
    write(tmp_path / "t", 201)
    with pytest.raises(DataError, match=r"t: n_tokens is 201, but .*manifest\.json says 200"):
        open_mixture(prefix, 10, 1)
    write_manifest(tmp_path, replace(manifest, files={"other": manifest.files["t"]}))
    with pytest.raises(DataError, match=r"manifest\.json: does not list t; it lists other"):
        open_mixture(prefix, 10, 1)
