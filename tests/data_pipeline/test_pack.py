from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.config import PackSection
from data_pipeline.encode import DOCUMENTS_FILE, TOKENS_PREFIX, length_histogram
from data_pipeline.pack import in_validation, shuffled, write_packed
from megagpt.data.indexed import TokenFile, TokenFileWriter
from megagpt.errors import DataError


def encoded_shard(folder: Path, doc_ids: list[int]) -> Path:
    """Document i is the tokens [i % 1000, i % 1000, ..., 0], of length 2 .. 6; its content hash is (i, i + 1)."""
    folder.mkdir(parents=True)
    lengths = [2 + i % 5 for i in doc_ids]
    with TokenFileWriter(folder / TOKENS_PREFIX, np.uint16) as writer:
        for i, length in zip(doc_ids, lengths, strict=True):
            writer.add_document([i % 1000] * (length - 1) + [0])
    rows = {
        "doc_id": pa.array(doc_ids, pa.int64()),
        "hash_high": pa.array(doc_ids, pa.uint64()),
        "hash_low": pa.array([i + 1 for i in doc_ids], pa.uint64()),
        "text_bytes": pa.array([10 * n for n in lengths], pa.int64()),
        "n_tokens": pa.array(lengths, pa.int64()),
    }
    pq.write_table(pa.table(rows), folder / DOCUMENTS_FILE)
    return folder


def documents(prefix: Path) -> list[list[int]]:
    file = TokenFile.open(prefix)
    return [file.document(i).tolist() for i in range(file.n_documents)]


def test_every_document_is_packed_once_with_its_end_of_text_and_counted_by_split_and_source(tmp_path: Path):
    shards = [encoded_shard(tmp_path / "a", list(range(1, 61))), encoded_shard(tmp_path / "b", list(range(61, 101)))]
    counts = write_packed(tmp_path, shards, ["web", "books"], 1000, PackSection(name="t", val_fraction=0.2))
    train, val = documents(tmp_path / "t_train"), documents(tmp_path / "t_val")
    expected = [[i] * (1 + i % 5) + [0] for i in range(1, 101)]
    assert sorted(train + val) == sorted(expected)
    assert counts.documents_in == counts.documents_out == 100
    for split, packed in (("train", train), ("val", val)):
        detail = counts.detail[split]
        assert detail["documents"] == len(packed)
        assert detail["tokens"] == sum(map(len, packed))
        assert detail["text_bytes"] == 10 * detail["tokens"]
        assert detail["sources"]["web"]["documents"] == sum(document[0] <= 60 for document in packed)
        assert sum(source["tokens"] for source in detail["sources"].values()) == detail["tokens"]
    assert 8 <= len(val) <= 35


def test_order_and_split_do_not_depend_on_how_documents_lie_in_shards(tmp_path: Path):
    ids = list(range(1, 101))
    one = [encoded_shard(tmp_path / "one/a", ids)]
    three = [encoded_shard(tmp_path / "three" / str(k), ids[k::3][::-1]) for k in (2, 0, 1)]
    settings = PackSection(val_fraction=0.2)
    write_packed(tmp_path / "one", one, ["s"], 1000, settings)
    write_packed(tmp_path / "three", three, ["s"] * 3, 1000, settings)
    for file in ("tokens_train.bin", "tokens_train.idx", "tokens_val.bin", "tokens_val.idx"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "three" / file).read_bytes()


def test_the_shuffle_is_a_permutation_that_changes_with_the_seed_and_mixes_shards():
    ids = np.concatenate([np.arange(500), (1 << 32) + np.arange(500)])
    order = shuffled(ids, 1)
    assert sorted(order.tolist()) == list(range(1000))
    assert shuffled(ids, 2).tolist() != order.tolist()
    assert 200 < (order[:500] < 500).sum() < 300


def test_the_split_depends_on_content_and_seed_and_takes_its_fraction():
    high, low = np.arange(20_000, dtype=np.uint64), np.arange(20_000, dtype=np.uint64)[::-1].copy()
    val = in_validation(high, low, 1, 0.05)
    assert abs(val.mean() - 0.05) < 4 * (0.05 * 0.95 / 20_000) ** 0.5
    assert np.array_equal(in_validation(high[::-1], low[::-1], 1, 0.05), val[::-1])
    assert not np.array_equal(in_validation(high, low, 2, 0.05), val)
    # A larger fraction keeps what was validation in validation.
    assert in_validation(high, low, 1, 0.1)[val].all()
    assert not in_validation(high, low, 1, 0.0).any()
    assert in_validation(high, low, 1, 1.0).all()


@pytest.mark.parametrize(("fraction", "split", "fix"), [(0.0, "validation", "raise"), (1.0, "training", "lower")])
def test_an_empty_split_is_an_error_that_says_what_to_change(tmp_path: Path, fraction: float, split: str, fix: str):
    shard = encoded_shard(tmp_path / "a", [1, 2, 3])
    with pytest.raises(DataError) as error:
        write_packed(tmp_path, [shard], ["s"], 1000, PackSection(val_fraction=fraction))
    assert str(error.value) == (
        f"pack.val_fraction = {fraction} of 3 documents leaves the {split} split empty; {fix} pack.val_fraction, "
        "choose another pack.seed or add documents"
    )
    assert not list(tmp_path.glob("tokens_*"))


def test_no_documents_at_all_is_an_error_of_its_own(tmp_path: Path):
    shard = encoded_shard(tmp_path / "a", [])
    with pytest.raises(DataError, match="no document is left after filters and deduplication"):
        write_packed(tmp_path, [shard], ["s"], 1000, PackSection())


def test_negative_and_huge_seeds_are_seeds(tmp_path: Path):
    ids = np.arange(100)
    assert len({tuple(shuffled(ids, seed).tolist()) for seed in (-1, 0, 1, 2**63, 2**64 - 3)}) == 5


def test_lengths_are_counted_by_the_next_power_of_two():
    assert length_histogram(np.array([1, 2, 3, 4, 5, 8, 9])) == {"1": 1, "2": 1, "4": 2, "8": 2, "16": 1}
