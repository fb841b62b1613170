"""Which document each token of a sample belongs to, beside a count by hand."""

from __future__ import annotations

import struct
import tempfile
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.data.indexed import MAGIC, TokenFile, TokenFileWriter
from megagpt.data.mixture import open_mixture, sequential_windows

# Documents of any number of sequences, of any length: both may be empty.
DOCUMENTS = st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=12)


def write(prefix: Path, documents: list[list[int]]) -> TokenFile:
    """A pair as Megatron writes it, where a document may have several sequences; token i has the id i."""
    lengths = [length for document in documents for length in document]
    n_tokens = sum(lengths)
    prefix.with_suffix(".bin").write_bytes(np.arange(n_tokens, dtype="<u2").tobytes())
    begins = [4 * begin // 2 for begin in accumulate(lengths, initial=0)][:-1]
    firsts = list(accumulate(map(len, documents), initial=0))
    header = struct.pack("<9sQBQQ", MAGIC, 1, 8, len(lengths), len(firsts))
    arrays = [np.array(lengths, "<i4"), np.array(begins, "<i8"), np.array(firsts, "<i8")]
    prefix.with_suffix(".idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    return TokenFile.open(prefix)


def by_hand(documents: list[list[int]], start: int, length: int) -> list[int]:
    of_token = [number for number, document in enumerate(documents) for _ in range(sum(document))]
    window = of_token[start : start + length]
    numbers = sorted(set(window))
    return [numbers.index(number) for number in window]


@given(documents=DOCUMENTS, data=st.data())
def test_every_window_of_every_file_is_told_apart_as_by_hand(documents, data):
    with tempfile.TemporaryDirectory() as folder:
        token_file = write(Path(folder) / "t", documents)
        start = data.draw(st.integers(0, token_file.n_tokens))
        length = data.draw(st.integers(0, token_file.n_tokens - start))
        found = token_file.documents(start, length)
    assert found.dtype == np.int32
    assert found.tolist() == by_hand(documents, start, length)


def test_a_window_outside_of_the_file_is_an_index_error(tmp_path):
    token_file = write(tmp_path / "t", [[3], [4]])
    with pytest.raises(IndexError, match=r"tokens 5 \.\. 8 of 7"):
        token_file.documents(5, 3)


@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=20), seq_len=st.integers(1, 7))
def test_a_samples_documents_go_with_its_tokens(lengths, seq_len):
    """Over two epochs, and in the windows for validation; the token after the last input belongs to a document too."""
    if sum(lengths) <= seq_len:
        lengths = [*lengths, seq_len]
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "t"
        with TokenFileWriter(prefix, "<u2") as writer:
            for number, length in enumerate(lengths):
                writer.add_document(np.full(length, number))  # a token tells its document
        mixture = open_mixture(prefix, seq_len, seed=4)
        windows = sequential_windows(TokenFile.open(prefix), seq_len, 1000)
        drawn = [(mixture, i) for i in range(2 * len(windows))] + [(windows, i) for i in range(len(windows))]
        for source, i in drawn:
            sample, documents = source.sample(i), source.documents(i)
            assert documents.shape == sample.shape == (seq_len + 1,)
            assert documents.tolist() == (sample - sample[0]).tolist()


def test_samples_of_a_mixture_are_told_apart_by_their_own_file(tmp_path):
    from megagpt.config.schema import WeightedTokens

    for name, length in (("short", 3), ("long", 50)):
        with TokenFileWriter(tmp_path / name, "<u2") as writer:
            for _ in range(150 // length):
                writer.add_document(np.full(length, length))
    parts = tuple(WeightedTokens(prefix=tmp_path / name, weight=1.0) for name in ("short", "long"))
    mixture = open_mixture(parts, 10, seed=0)
    for i in range(20):
        length = mixture.sample(i)[0]
        changes = np.flatnonzero(np.diff(mixture.documents(i)))
        assert (np.diff(changes) == length).all()
        assert (len(changes) >= 3) == (length == 3)
