"""megagpt.data.indexed: the on-disk token format."""

from __future__ import annotations

import itertools
import struct
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data.indexed import DTYPE_OF_CODE, TokenFile, TokenFileWriter, token_dtype
from megagpt.errors import DataError

DOCUMENTS = [[1, 2, 3], [], [65_000, 0], [7]]


@pytest.fixture
def indexed_dataset():
    """Megatron's own reader and writer; importing it warns of what its torch dislikes."""
    pytest.importorskip("megatron.core", reason="megatron-core (a test extra) is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def write(prefix: Path, documents, dtype=np.uint16) -> Path:
    with TokenFileWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def contents(token_file: TokenFile) -> list[list[int]]:
    return [token_file.document(i).tolist() for i in range(token_file.n_documents)]


def test_bytes_of_the_index_are_as_the_format_says(tmp_path):
    """Worked by hand: two documents of 3 and 1 uint16 tokens."""
    write(tmp_path / "t", [[1, 2, 3], [4]])
    assert (tmp_path / "t.bin").read_bytes() == bytes([1, 0, 2, 0, 3, 0, 4, 0])
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3)
    expected += struct.pack("<ii", 3, 1) + struct.pack("<qq", 0, 6) + struct.pack("<qqq", 0, 1, 2)
    assert (tmp_path / "t.idx").read_bytes() == expected


def test_what_was_written_is_read(tmp_path):
    with TokenFileWriter(tmp_path / "sub" / "a.b_train", np.uint16) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    assert (writer.n_documents, writer.n_tokens, writer.max_token_id) == (4, 6, 65_000)
    token_file = TokenFile.open(tmp_path / "sub" / "a.b_train")
    assert contents(token_file) == DOCUMENTS
    assert (token_file.n_tokens, token_file.n_documents, token_file.n_sequences) == (6, 4, 4)
    assert token_file.dtype == np.uint16
    assert token_file.tokens.tolist() == [1, 2, 3, 65_000, 0, 7]
    assert token_file.window(2, 3).tolist() == [3, 65_000, 0]
    assert not token_file.tokens.flags.writeable
    assert sorted(path.name for path in (tmp_path / "sub").iterdir()) == ["a.b_train.bin", "a.b_train.idx"]


@given(
    documents=st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=9), max_size=9),
    dtype=st.sampled_from(["<i4", "<i8"]),
)
@settings(max_examples=30, deadline=None)
def test_any_documents_survive_the_round_trip(documents, dtype):
    with tempfile.TemporaryDirectory() as folder:
        assert contents(TokenFile.open(write(Path(folder) / "t", documents, dtype))) == documents


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 60_000), max_size=6), max_size=20),
    cuts=st.lists(st.integers(0, 20), max_size=5),
)
def test_blocks_of_documents_make_the_bytes_that_single_ones_make(documents, cuts):
    with tempfile.TemporaryDirectory() as folder:
        one, blocks = Path(folder) / "one", Path(folder) / "blocks"
        write(one, documents)
        bounds = [0, *sorted(min(cut, len(documents)) for cut in cuts), len(documents)]
        with TokenFileWriter(blocks, np.uint16) as writer:
            for start, end in itertools.pairwise(bounds):
                part = documents[start:end]
                flat = np.array([token for document in part for token in document], np.int64)
                writer.add_documents(flat, np.array([len(document) for document in part], np.int64))
        assert (writer.n_documents, writer.n_tokens) == (len(documents), sum(map(len, documents)))
        assert writer.max_token_id == max((token for document in documents for token in document), default=-1)
        for ending in (".bin", ".idx"):
            assert one.with_suffix(ending).read_bytes() == blocks.with_suffix(ending).read_bytes()


def test_a_wrong_token_of_a_block_is_named_with_its_document(tmp_path):
    with TokenFileWriter(tmp_path / "t", np.uint16) as writer:
        writer.add_documents(np.array([1, 2]), np.array([1, 0, 1]))
        with pytest.raises(DataError, match=r"t\.bin: document 5: token id 70000 does not fit uint16"):
            writer.add_documents(np.array([3, 4, 5, 70000, -1]), np.array([2, 1, 2]))
        with pytest.raises(ValueError, match="lengths add up to 3, but there are 2 tokens"):
            writer.add_documents(np.array([1, 2]), np.array([3]))
    assert contents(TokenFile.open(tmp_path / "t")) == [[1], [], [2]]


def test_no_documents_make_a_valid_pair(tmp_path):
    token_file = TokenFile.open(write(tmp_path / "t", []))
    assert (token_file.n_tokens, token_file.n_documents, token_file.n_sequences) == (0, 0, 0)
    assert token_file.window(0, 0).tolist() == []


def test_more_documents_than_are_handled_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("megagpt.data.indexed._CHUNK", 3)
    documents = [list(range(i % 4)) for i in range(11)]
    token_file = TokenFile.open(write(tmp_path / "t", documents))
    assert contents(token_file) == documents


@pytest.mark.parametrize(
    ("tokens", "dtype", "complaint"),
    [
        ([1, 65_536], np.uint16, "token id 65536 does not fit uint16, which holds 0 .. 65535"),
        ([-1], np.int32, "token id -1 does not fit int32, which holds 0 .. 2147483647"),
        ([2**40], np.int32, "token id 1099511627776 does not fit int32"),
        ([1.5], np.int32, "tokens must be one row of 64-bit integers, got 1 dimension(s) of float64"),
        ([2**70], np.int64, "tokens must be one row of 64-bit integers, got 1 dimension(s) of object"),
        ([[1, 2]], np.int32, "tokens must be one row of 64-bit integers, got 2 dimension(s) of int64"),
    ],
)
def test_ids_that_do_not_fit_are_refused_and_leave_nothing(tmp_path, tokens, dtype, complaint):
    with pytest.raises(DataError) as error:
        write(tmp_path / "t", [[5], tokens], dtype)
    assert complaint in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 't.bin'}: document 1: ")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_writer_leaves_the_older_pair_alone(tmp_path):
    write(tmp_path / "t", DOCUMENTS)
    with pytest.raises(DataError, match="token id -1"):
        write(tmp_path / "t", [[9], [-1]])
    assert contents(TokenFile.open(tmp_path / "t")) == DOCUMENTS
    assert len(list(tmp_path.iterdir())) == 2


def test_a_pair_is_replaced_by_a_newer_one(tmp_path):
    write(tmp_path / "t", DOCUMENTS)
    write(tmp_path / "t", [[9]])
    assert contents(TokenFile.open(tmp_path / "t")) == [[9]]


def test_nothing_can_be_read_while_the_writer_is_at_work(tmp_path):
    with TokenFileWriter(tmp_path / "t", np.uint16) as writer:
        writer.add_document([1])
        with pytest.raises(DataError, match="no such file"):
            TokenFile.open(tmp_path / "t")


def test_a_type_that_the_format_does_not_know_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be stored as float32; the format knows uint8, int8"):
        TokenFileWriter(tmp_path / "t", np.float32)


def test_adding_outside_the_block_is_refused(tmp_path):
    with pytest.raises(ValueError, match="belongs inside"):
        TokenFileWriter(tmp_path / "t", np.uint16).add_document([1])


def test_megatron_reads_our_files(tmp_path, indexed_dataset):
    for name, dtype in (("a", np.uint16), ("b", np.int32)):
        write(tmp_path / name, DOCUMENTS, dtype)
        theirs = indexed_dataset.IndexedDataset(str(tmp_path / name))
        assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
        assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
        assert theirs[0].dtype == dtype


def test_our_files_are_megatrons_byte_for_byte(tmp_path, indexed_dataset):
    write(tmp_path / "ours", DOCUMENTS)
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()


def test_megatrons_files_open_with_several_sequences_a_document(tmp_path, indexed_dataset):
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "t.bin"), dtype=np.int32)
    builder.add_document(np.array([1, 2, 3, 4]), [1, 3])
    builder.add_document(np.array([], dtype=np.int32), [])
    builder.add_document(np.array([5, 6]), [2])
    builder.finalize(str(tmp_path / "t.idx"))
    token_file = TokenFile.open(tmp_path / "t")
    assert (token_file.n_documents, token_file.n_sequences, token_file.n_tokens) == (3, 3, 6)
    assert contents(token_file) == [[1, 2, 3, 4], [], [5, 6]]


def test_types_are_chosen_and_numbered_as_megatron_does(indexed_dataset):
    for vocab_size in (1, 50_257, 65_499, 65_500, 65_536, 200_019):
        assert token_dtype(vocab_size) == indexed_dataset.DType.optimal_dtype(vocab_size)
    for code, dtype in DTYPE_OF_CODE.items():
        assert dtype == indexed_dataset.DType.dtype_from_code(code)


def test_types_by_vocabulary_without_megatron():
    assert [token_dtype(size).name for size in (50_257, 65_499, 65_500, 65_536)] == [
        "uint16",
        "uint16",
        "int32",
        "int32",
    ]
    with pytest.raises(DataError, match="vocabulary of 0 tokens"):
        token_dtype(0)


INDEX = 34 + 4 * 3  # where the pointers of three sequences begin
CORRUPTIONS = {
    "magic": (0, b"X", "begins with b'XMIDIDX\\x00\\x00', expected b'MMIDIDX\\x00\\x00'"),
    "version": (9, struct.pack("<Q", 2), "version 2, expected 1"),
    "unknown type": (17, b"\x63", "type code 99, expected one of 1 (uint8)"),
    "floating point": (17, b"\x07", "type code 7, expected one of 1 (uint8)"),
    "sequences": (18, struct.pack("<Q", 4), "102 bytes, expected 114 for the 4 sequences and 4 document indices"),
    "very many sequences": (18, struct.pack("<Q", 2**64 - 1), "102 bytes, expected"),
    "documents": (26, struct.pack("<Q", 3), "102 bytes, expected 94 for the 3 sequences and 3 document indices"),
    "no documents": (26, struct.pack("<Q", 0), "0 document indices, expected documents + 1"),
    "negative length": (34 + 4, struct.pack("<i", -1), "sequence 1 has length -1, expected 0 or more"),
    "length": (34 + 4, struct.pack("<i", 3), "sequence 2 begins at byte 10, expected byte 12"),
    "last length": (34 + 8, struct.pack("<i", 9), "t.bin: 12 bytes, expected 28"),
    "first pointer": (INDEX, struct.pack("<q", 2), "sequence 0 begins at byte 2, expected byte 0"),
    "pointer": (INDEX + 8, struct.pack("<q", 8), "sequence 1 begins at byte 8, expected byte 6"),
    "first document": (INDEX + 24, struct.pack("<q", 1), "the first document index is 1, expected 0"),
    "document order": (INDEX + 32, struct.pack("<q", 3), "document index 2 is 2, expected at least 3"),
    "negative document": (INDEX + 32, struct.pack("<q", -2), "document index 1 is -2, expected at least 0"),
    "last document": (INDEX + 48, struct.pack("<q", 2), "the last document index is 2, expected 3"),
}


@pytest.mark.parametrize(("offset", "content", "complaint"), CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_each_wrong_field_of_the_index_is_named(tmp_path, offset, content, complaint):
    write(tmp_path / "t", [[1, 2, 3], [4, 5], [6]])
    index = bytearray((tmp_path / "t.idx").read_bytes())
    index[offset : offset + len(content)] = content
    (tmp_path / "t.idx").write_bytes(index)
    with pytest.raises(DataError) as error:
        TokenFile.open(tmp_path / "t")
    assert complaint in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_an_index_cut_anywhere_is_refused(tmp_path):
    write(tmp_path / "t", [[1, 2, 3], [4, 5], [6]])
    whole = (tmp_path / "t.idx").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "t.idx").write_bytes(whole[:length])
        with pytest.raises(DataError, match=f"t.idx: {length} bytes"):
            TokenFile.open(tmp_path / "t")
    (tmp_path / "t.idx").write_bytes(whole + b"\0")
    with pytest.raises(DataError, match="103 bytes, expected 102"):
        TokenFile.open(tmp_path / "t")


@pytest.mark.parametrize("length", [0, 1, 11, 13, 100])
def test_tokens_of_another_size_are_refused(tmp_path, length):
    write(tmp_path / "t", [[1, 2, 3], [4, 5], [6]])
    (tmp_path / "t.bin").write_bytes(bytes(length))
    with pytest.raises(DataError, match=f"t.bin: {length} bytes, expected 12, where the last sequence of t.idx ends"):
        TokenFile.open(tmp_path / "t")


@given(
    edits=st.dictionaries(st.integers(0, 101), st.integers(0, 255), min_size=1, max_size=6),
    tail=st.binary(max_size=20),
    cut=st.integers(0, 102),
)
@settings(max_examples=200, deadline=None)
def test_a_mutated_index_is_refused_or_consistent(edits, tail, cut):
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "t"
        (Path(folder) / "t.bin").write_bytes(bytes([1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0]))
        index = bytearray(struct.pack("<9sQBQQ3i7q", b"MMIDIDX", 1, 8, 3, 4, 3, 2, 1, 0, 6, 10, 0, 1, 2, 3))
        for offset, value in edits.items():
            index[offset] = value
        (Path(folder) / "t.idx").write_bytes(index + tail if cut == 102 else index[:cut] if cut % 2 else index)
        try:
            token_file = TokenFile.open(prefix)
        except DataError:
            return
        assert token_file.tokens.nbytes == 12
        assert [token for document in contents(token_file) for token in document] == token_file.tokens.tolist()


@given(index=st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_garbage_is_never_opened(index):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "t.bin").write_bytes(bytes(2))
        (Path(folder) / "t.idx").write_bytes(index)
        with pytest.raises(DataError):
            TokenFile.open(Path(folder) / "t")


def test_missing_files_are_named_with_what_would_be_right(tmp_path):
    write(tmp_path / "t", [[1]])
    with pytest.raises(DataError) as error:
        TokenFile.open(tmp_path / "t.bin")
    assert str(error.value) == (
        f"{tmp_path}/t.bin.idx: no such file; {tmp_path}/t.bin must name a .bin/.idx pair; give the path without .bin"
    )
    (tmp_path / "t.bin").unlink()
    with pytest.raises(DataError, match=r"t\.bin: no such file"):
        TokenFile.open(tmp_path / "t")
    (tmp_path / "t.bin").mkdir()
    with pytest.raises(DataError, match=r"t\.bin: cannot be read: Is a directory"):
        TokenFile.open(tmp_path / "t")


def test_reading_outside_the_file_is_an_index_error(tmp_path):
    token_file = TokenFile.open(write(tmp_path / "t", [[1, 2], [3]]))
    for start, length in ((-1, 1), (0, 4), (3, 1), (2, -1)):
        with pytest.raises(IndexError):
            token_file.window(start, length)
    for i in (-1, 2):
        with pytest.raises(IndexError, match=f"document {i} of 2"):
            token_file.document(i)
