import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.dedup.clusters import connected_components, write_removed
from data_pipeline.dedup.grouping import EDGES_FILE, write_edges
from data_pipeline.dedup.minhash import MinHasher
from data_pipeline.dedup.signatures import BANDS_FILE, SIGNATURES_FILE, write_signatures

HASHER = MinHasher(5, 14, 8)


def document(seed: int, n_words: int = 120) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(5000)}" for _ in range(n_words))


def write_documents(path: Path, documents: dict[int, str]) -> Path:
    pq.write_table(pa.table({"doc_id": pa.array(documents, pa.int64()), "text": list(documents.values())}), path)
    return path


def removed(folder: Path, shards: list[dict[int, str]], n_partitions: int = 1) -> list[dict]:
    """The whole of deduplication over shards; rows of removed.parquet by document id."""
    signed = []
    for i, shard in enumerate(shards):
        signed.append(folder / f"signatures{i}")
        signed[-1].mkdir(parents=True)
        write_signatures(signed[-1], write_documents(folder / f"docs{i}.parquet", shard), HASHER)
    edges: dict[str, list[Path]] = {"exact": [], "near": []}
    for kind, folders in edges.items():
        for p in range(n_partitions):
            folders.append(folder / f"{kind}{p}")
            folders[-1].mkdir()
            write_edges(folders[-1], kind, signed, (p, n_partitions))
    n_documents = sum(map(len, shards))
    counts = write_removed(folder, edges["exact"], edges["near"], n_documents)
    assert counts.documents_in == n_documents == counts.documents_out + sum(counts.rejected.values())
    return pq.read_table(folder / "removed.parquet").to_pylist()


def brute_force_components(edges: list[tuple[int, int]], n: int) -> list[int]:
    root = list(range(n))
    changed = True
    while changed:
        changed = False
        for a, b in edges:
            low = min(root[a], root[b])
            changed |= root[a] != low or root[b] != low
            root[a] = root[b] = low
    return root


@given(st.integers(1, 25).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))))
def test_components_are_those_of_repeated_relabelling(case: tuple[int, list[tuple[int, int]]]):
    n, edges = case
    ends = np.array([a for a, _ in edges], np.int64)
    other_ends = np.array([b for _, b in edges], np.int64)
    assert connected_components(ends, other_ends, n).tolist() == brute_force_components(edges, n)


def test_a_long_chain_is_one_component():
    ends = np.random.default_rng(0).permutation(9_999)
    assert (connected_components(ends, ends + 1, 10_000) == 0).all()


def test_injected_exact_copies_are_all_removed_and_the_first_one_stays(tmp_path: Path):
    originals = {i: document(i) for i in range(20)}
    copies = {(1 << 32) + i: originals[i].upper().replace(" ", " ,\n") for i in range(0, 20, 2)}
    rows = removed(tmp_path, [originals, copies])
    assert [row["doc_id"] for row in rows] == list(copies)
    assert {row["reason"] for row in rows} == {"exact_duplicate"}
    assert [row["cluster"] for row in rows] == list(range(0, 20, 2))
    assert {row["cluster_size"] for row in rows} == {2}


def test_near_copies_are_found_and_named_so(tmp_path: Path):
    originals = {i: document(i, 400) for i in range(10)}
    near = {(1 << 32) + i: originals[i] + " one more sentence at the end" for i in range(5)}
    rows = removed(tmp_path, [originals, near])
    assert [(row["doc_id"], row["reason"], row["cluster"]) for row in rows] == [
        ((1 << 32) + i, "near_duplicate", i) for i in range(5)
    ]


def test_documents_shorter_than_the_ngram_take_part_in_exact_removal_only(tmp_path: Path):
    rows = removed(tmp_path, [{0: "one two three", 1: "One, two, three!", 2: "one two three four"}])
    assert [(row["doc_id"], row["reason"]) for row in rows] == [(1, "exact_duplicate")]


def test_texts_without_any_word_are_equal_only_if_their_characters_are(tmp_path: Path):
    rows = removed(tmp_path, [{0: "!!!", 1: "???", 2: "!!!"}])
    assert [row["doc_id"] for row in rows] == [2]


def test_the_copy_of_the_earlier_shard_stays_even_across_a_chain_of_near_copies(tmp_path: Path):
    text = document(1, 400)
    shards = [{5: text + " alpha beta"}, {(1 << 32): text}, {(2 << 32): text + " gamma delta", (2 << 32) + 1: text}]
    rows = {row["doc_id"]: row for row in removed(tmp_path, shards)}
    assert set(rows) == {1 << 32, 2 << 32, (2 << 32) + 1}
    assert {row["cluster"] for row in rows.values()} == {5}
    assert {row["cluster_size"] for row in rows.values()} == {4}
    assert rows[(2 << 32) + 1]["reason"] == "exact_duplicate"


@pytest.mark.parametrize("n_partitions", [2, 7])
def test_the_number_of_partitions_and_the_order_of_shards_do_not_change_the_result(tmp_path: Path, n_partitions: int):
    rng = random.Random(5)
    texts = [document(rng.randrange(25), 60) + rng.choice(["", " extra"]) for _ in range(60)]
    shards = [{(s << 32) + i: texts[20 * s + i] for i in range(20)} for s in range(3)]
    expected = removed(tmp_path / "one", shards)
    assert removed(tmp_path / "many", shards[::-1], n_partitions) == expected
    assert 20 < len(expected) < 60


def test_an_empty_shard_gives_empty_signatures_and_no_edges(tmp_path: Path):
    assert removed(tmp_path, [{}]) == []
    assert pq.read_table(tmp_path / "signatures0" / SIGNATURES_FILE).num_rows == 0
    assert pq.read_table(tmp_path / "signatures0" / BANDS_FILE).num_rows == 0
    assert pq.read_table(tmp_path / "near0" / EDGES_FILE).num_rows == 0


def test_bands_are_sorted_by_key_so_that_a_partition_reads_only_its_row_groups(tmp_path: Path):
    write_signatures(tmp_path, write_documents(tmp_path / "d.parquet", {i: document(i) for i in range(50)}), HASHER)
    table = pq.read_table(tmp_path / BANDS_FILE)
    keys = table.column("band_key").to_numpy()
    assert len(keys) == 50 * 14
    assert (keys[1:] >= keys[:-1]).all()
