import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_pipeline.config import PackSection
from data_pipeline.encode import ENCODED_FILE, ENCODED_SCHEMA, TOKENS_PREFIX
from data_pipeline.histogram import size_classes
from data_pipeline.pack import bucket_of, write_packed
from data_pipeline.pack_plan import slug
from data_pipeline.shuffle import mix64, order_keys, split_of
from megagpt.data.indexed import TokenFile, TokenFileWriter
from megagpt.errors import DataError
from tests.data_pipeline.encoded_shards import document, documents_of, encoded_shard

PILE = ("Pile-CC", "PubMed Central", "Wikipedia (en)", "Gutenberg (PG-19)", "ArXiv")
ROOT = Path(__file__).resolve().parents[2]


def brute_mix(value: int) -> int:
    """splitmix64's finaliser in Python's own integers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return value ^ (value >> 31)


def brute_packed(ids: list[int], seed: int, val: float, test: float) -> dict[str, list[list[int]]]:
    """The documents of each split, by the definitions: sorted by a keyed hash of the id, split by one of the text."""
    order_salt, split_salt = (brute_mix((seed ^ (salt << 16)) % 2**64) for salt in (0x6F72646572, 0x73706C6974))
    packed: dict[str, list[list[int]]] = {"train": [], "val": [], "test": []}
    for i in sorted(ids, key=lambda i: (brute_mix(i ^ order_salt), i)):
        fraction = (brute_mix((i + 1) ^ brute_mix(i ^ split_salt)) >> 11) / 2**53
        split = "val" if fraction < val else "test" if fraction < val + test else "train"
        packed[split].append(document(i))
    return packed


def test_every_document_is_packed_once_with_its_end_of_text_and_counted_by_split_and_source(tmp_path: Path):
    shards = [
        encoded_shard(tmp_path / "a", list(range(1, 61))),
        encoded_shard(tmp_path / "b", list(range(61, 101)), lambda _: "books"),
    ]
    counts = write_packed(tmp_path, shards, 1000, PackSection(name="t", val_fraction=0.2))
    train, val = documents_of(tmp_path / "t_train"), documents_of(tmp_path / "t_val")
    assert sorted(train + val) == sorted(document(i) for i in range(1, 101))
    assert counts.documents_in == counts.documents_out == 100
    for split, packed in (("train", train), ("val", val)):
        detail = counts.detail["splits"][split]
        assert detail["documents"] == len(packed)
        assert detail["tokens"] == sum(map(len, packed))
        assert detail["text_bytes"] == 10 * detail["tokens"]
        assert detail["sources"]["web"]["documents"] == sum(d[0] <= 60 for d in packed)
        assert sum(source["tokens"] for source in detail["sources"].values()) == detail["tokens"]
        file = counts.detail["files"][f"t_{split}"]
        assert {**detail, "split": split, "dtype": "uint16", "max_token_id": max(map(max, packed))} == file
    assert 8 <= len(val) <= 35


@settings(max_examples=30, deadline=None)
@given(
    ids=st.lists(st.integers(0, 2**62), min_size=12, max_size=80, unique=True),
    cuts=st.lists(st.integers(0, 80), max_size=4),
    bucket_bytes=st.sampled_from([30, 500, 1 << 20]),
    per_source=st.booleans(),
    seed=st.integers(-5, 2**64),
)
def test_however_documents_lie_in_shards_and_buckets_the_files_are_those_of_the_definition(
    tmp_path_factory, ids, cuts, bucket_bytes, per_source, seed
):
    expected = brute_packed(ids, seed, 0.3, 0.2)
    assume(all(expected.values()))
    out = tmp_path_factory.mktemp("packed")
    bounds = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    source = {i: PILE[i % len(PILE)] for i in ids}
    shards = [encoded_shard(out / f"shard{a}", ids[a:b], source.__getitem__) for a, b in itertools.pairwise(bounds)]
    section = PackSection(val_fraction=0.3, test_fraction=0.2, per_source=per_source, seed=seed)
    write_packed(out, shards[::-1], 1000, section, bucket_bytes=bucket_bytes)
    assert documents_of(out / "tokens_val") == expected["val"]
    assert documents_of(out / "tokens_test") == expected["test"]
    if not per_source:
        assert documents_of(out / "tokens_train") == expected["train"]
    for name in PILE if per_source else ():
        order = [d for d in expected["train"] if d in [document(i) for i in ids if source[i] == name]]
        prefix = out / f"tokens_{slug(name)}_train"
        assert (documents_of(prefix) if order else []) == order
        assert prefix.with_suffix(".bin").exists() == bool(order)
    assert not (out / "buckets").exists()


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1), st.integers(1, 5000))
def test_buckets_follow_each_other_in_the_order_of_keys(keys, n_buckets):
    buckets = bucket_of(np.sort(np.array(keys, np.uint64)), n_buckets)
    assert (np.diff(buckets) >= 0).all()
    assert buckets.min() >= 0
    assert buckets.max() < n_buckets


def test_the_shuffle_mixes_shards_and_changes_with_the_seed():
    ids = np.concatenate([np.arange(500), (1 << 32) + np.arange(500)])
    order = np.argsort(order_keys(ids, 1))
    assert order.tolist() != np.argsort(order_keys(ids, 2)).tolist()
    assert 200 < (order[:500] < 500).sum() < 300
    assert [brute_mix(i) for i in (0, 1, 2**63)] == mix64(np.array([0, 1, 2**63], np.uint64)).tolist()


def test_the_split_depends_on_content_and_seed_and_takes_its_fraction():
    high, low = np.arange(20_000, dtype=np.uint64), np.arange(20_000, dtype=np.uint64)[::-1].copy()
    val = split_of(high, low, 1, 0.05) == 1
    assert abs(val.mean() - 0.05) < 4 * (0.05 * 0.95 / 20_000) ** 0.5
    assert np.array_equal(split_of(high[::-1], low[::-1], 1, 0.05)[::-1] == 1, val)
    assert not np.array_equal(split_of(high, low, 2, 0.05) == 1, val)
    # A larger fraction keeps what was validation in validation, and a test split takes from training only.
    assert (split_of(high, low, 1, 0.1)[val] == 1).all()
    three = split_of(high, low, 1, 0.05, 0.1)
    assert np.array_equal(three == 1, val)
    assert abs((three == 2).mean() - 0.1) < 4 * (0.1 * 0.9 / 20_000) ** 0.5


@pytest.mark.parametrize(
    ("fractions", "key", "split", "fix"),
    [
        ({"val_fraction": 0.0}, "val_fraction", "validation", "raise"),
        ({"val_fraction": 0.9999999}, "val_fraction", "training", "lower"),
        ({"val_fraction": 0.5, "test_fraction": 1e-9}, "test_fraction", "test", "raise"),
    ],
)
def test_an_empty_split_is_an_error_that_says_what_to_change(tmp_path: Path, fractions, key, split, fix):
    shard = encoded_shard(tmp_path / "a", [1, 2, 3, 4, 5, 6])
    with pytest.raises(DataError) as error:
        write_packed(tmp_path, [shard], 1000, PackSection(**fractions))
    assert str(error.value) == (
        f"pack.{key} = {fractions[key]} of 6 documents leaves the {split} split empty; {fix} pack.{key}, "
        "choose another pack.seed or add documents"
    )
    assert not list(tmp_path.glob("tokens_*"))


def test_no_documents_at_all_is_an_error_of_its_own(tmp_path: Path):
    shard = encoded_shard(tmp_path / "a", [])
    with pytest.raises(DataError, match="no document is left after filters and deduplication"):
        write_packed(tmp_path, [shard], 1000, PackSection())


def test_sources_get_file_names_that_are_safe_and_unlike(tmp_path: Path):
    names = ["Pile-CC", "PubMed Central", "Wikipedia (en)", "../etc", ".hidden", "a/b:c", "维基"]
    assert [slug(name) for name in names] == [
        "Pile-CC",
        "PubMed_Central",
        "Wikipedia_en",
        "etc",
        "hidden",
        "a_b_c",
        "维基",
    ]
    with pytest.raises(DataError, match=r"source '//': no part of this name can be in a file's name"):
        slug("//")
    shard = encoded_shard(tmp_path / "a", list(range(50)), lambda i: ("web page", "web/page")[i % 2])
    with pytest.raises(DataError) as error:
        write_packed(tmp_path, [shard], 1000, PackSection(per_source=True, val_fraction=0.2))
    assert str(error.value) == (
        "pack.per_source: the sources 'web page' and 'web/page' would both be written to tokens_web_page_train; set "
        "another `name` for one of them, or pack.per_source=false"
    )
    many = encoded_shard(tmp_path / "many", list(range(600)), lambda i: f"s{i % 300}")
    with pytest.raises(DataError, match=r"300 sources, but at most 250"):
        write_packed(tmp_path, [many], 1000, PackSection(per_source=True, val_fraction=0.2))


@pytest.mark.parametrize("change", ["cut", "longer"])
def test_tokens_that_are_not_those_of_the_documents_are_an_error(tmp_path: Path, change: str):
    shard = encoded_shard(tmp_path / "a", list(range(50)))
    content = (shard / "tokens.bin").read_bytes()
    (shard / "tokens.bin").write_bytes(content[:-2] if change == "cut" else content + b"\1\0")
    with pytest.raises(DataError, match=r"tokens\.bin: (ends before|holds more tokens)"):
        write_packed(tmp_path, [shard], 1000, PackSection(val_fraction=0.2))


@pytest.mark.parametrize("bucket_bytes", [1 << 20, 700])
def test_progress_adds_up_to_the_text_and_the_documents(tmp_path: Path, bucket_bytes: int):
    shard = encoded_shard(tmp_path / "a", list(range(200)))
    calls: list[tuple[int, int]] = []
    section = PackSection(val_fraction=0.2)
    write_packed(tmp_path, [shard], 1000, section, lambda *call: calls.append(call), bucket_bytes)
    assert sum(text_bytes for text_bytes, _ in calls) == 10 * sum(len(document(i)) for i in range(200))
    assert sum(documents for _, documents in calls) == 200


MEMORY = """
import sys
from pathlib import Path
from data_pipeline.config import PackSection
from data_pipeline.memory import peak_rss_bytes
from data_pipeline.pack import write_packed
shards = [Path(word) for word in sys.argv[2:]]
write_packed(Path(sys.argv[1]), shards, 50000, PackSection(val_fraction=0.1), bucket_bytes=1 << 20)
print(peak_rss_bytes() >> 20)
"""


def test_ten_times_the_tokens_take_no_more_memory(tmp_path: Path):
    shard = big_shard(tmp_path / "a", n_documents=4000, n_tokens=2000)
    peaks = []
    for n in (1, 10):
        (tmp_path / str(n)).mkdir()
        # The same shard ten times is ten times the documents, each of them ten times.
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path / str(n)), *[str(shard)] * n],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert TokenFile.open(tmp_path / "10/tokens_train").n_tokens > 60_000_000
    assert peaks[1] < peaks[0] + 60  # MiB; the tokens alone are 160


def big_shard(folder: Path, n_documents: int, n_tokens: int) -> Path:
    folder.mkdir()
    lengths = np.full(n_documents, n_tokens)
    with TokenFileWriter(folder / TOKENS_PREFIX, np.uint16) as writer:
        writer.add_documents(np.arange(n_documents * n_tokens, dtype=np.uint16) % np.uint16(50000), lengths)
    ids = np.arange(n_documents)
    columns = [ids, ids.astype(np.uint64), ids.astype(np.uint64), lengths * 4, lengths]
    arrays = [*map(pa.array, columns), pa.array(["web"] * n_documents)]
    pq.write_table(pa.Table.from_arrays(arrays, schema=ENCODED_SCHEMA), folder / ENCODED_FILE)
    return folder


def test_lengths_are_counted_by_the_next_power_of_two():
    assert size_classes([1, 2, 3, 4, 5, 8, 9]) == {"1": 1, "2": 1, "4": 2, "8": 2, "16": 1}
