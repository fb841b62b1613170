import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dedup.clusters import (
    CLUSTERS_FILE,
    connected_components,
    read_clusters,
    read_removed,
    write_clusters,
)
from data_pipeline.dedup.grouping import EDGES_FILE
from data_pipeline.dedup.signatures import BANDS_FILE, SIGNATURES_FILE, SIGNATURES_SCHEMA
from megagpt.errors import DataError
from tests.data_pipeline.dedup_job import DedupJob
from tests.data_pipeline.dedup_oracle import components, jaccard_of, random_text, with_words_changed

S1, S2 = 1 << 32, 2 << 32


def write_pairs(folder: Path, pairs: list[tuple[int, int]]) -> Path:
    folder.mkdir(parents=True)
    columns = {
        "root": pa.array([a for a, _ in pairs], pa.int64()),
        "doc_id": pa.array([b for _, b in pairs], pa.int64()),
    }
    pq.write_table(pa.table(columns), folder / EDGES_FILE)
    return folder


def write_lengths(folder: Path, lengths: dict[int, int]) -> Path:
    folder.mkdir(parents=True)
    rows = [{"doc_id": i, "hash_high": 0, "hash_low": 0, "n_words": 0, "text_bytes": n} for i, n in lengths.items()]
    pq.write_table(pa.Table.from_pylist(rows, SIGNATURES_SCHEMA), folder / SIGNATURES_FILE)
    return folder


@given(st.integers(1, 25).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))))
@settings(deadline=None)
def test_components_are_those_of_repeated_relabelling(case: tuple[int, list[tuple[int, int]]]):
    n, edges = case
    ends = np.array([a for a, _ in edges], np.int64)
    other_ends = np.array([b for _, b in edges], np.int64)
    expected = components(edges, range(n))
    assert connected_components(ends, other_ends, n).tolist() == [expected[i] for i in range(n)]


def test_a_long_chain_is_one_component():
    ends = np.random.default_rng(0).permutation(9_999)
    assert (connected_components(ends, ends + 1, 10_000) == 0).all()


documents_and_pairs = st.integers(2, 14).flatmap(
    lambda n: st.tuples(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 200)), min_size=n, max_size=n, unique=True),
        st.lists(st.integers(1, 9), min_size=n, max_size=n),
        st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda p: p[0] != p[1]), max_size=14),
        st.tuples(*[st.integers(-2, 2)] * 3),
        st.sampled_from(["first", "longest"]),
        st.randoms(use_true_random=False),
    )
)


@given(documents_and_pairs)
@settings(deadline=None, max_examples=60)
def test_any_order_and_partition_of_the_edges_keeps_the_copy_that_the_rule_names(tmp_path_factory, case):
    """Against a few lines of plain Python: components, then the best by priority, length and id."""
    places, lengths, pairs, priorities, keep, rng = case
    ids = sorted((shard << 32) + record for shard, record in places)
    length = dict(zip(ids, lengths, strict=True))
    pairs = [(min(ids[a], ids[b]), max(ids[a], ids[b])) for a, b in pairs]
    folder = tmp_path_factory.mktemp("case")
    shards = [write_lengths(folder / f"s{s}", {i: length[i] for i in ids if i >> 32 == s}) for s in range(3)]

    root = components(pairs, ids)
    clusters = {r: [i for i in ids if root[i] == r] for r in root.values()}
    best = {
        r: min(members, key=lambda i: (-priorities[i >> 32], -length[i] if keep == "longest" else 0, i))
        for r, members in clusters.items()
    }
    expected = [(i, root[i], len(clusters[root[i]]), best[root[i]] == i) for i in ids if len(clusters[root[i]]) > 1]
    for attempt in range(2):
        rng.shuffle(pairs)
        cut = rng.randint(0, len(pairs))
        near = [write_pairs(folder / f"near{attempt}-{k}", part) for k, part in enumerate((pairs[:cut], pairs[cut:]))]
        out = folder / f"out{attempt}"
        out.mkdir()
        counts = write_clusters(out, [], near, shards, priorities, keep)
        rows = pq.read_table(out / CLUSTERS_FILE).to_pylist()
        assert [(r["doc_id"], r["cluster"], r["cluster_size"], r["kept"]) for r in rows] == expected
        assert counts.documents_in == len(ids) == counts.documents_out + sum(counts.rejected.values())
    assert (folder / "out0" / CLUSTERS_FILE).read_bytes() == (folder / "out1" / CLUSTERS_FILE).read_bytes()


def test_the_graph_of_all_pairs_is_found_where_similarities_are_clear(tmp_path: Path):
    """Exact Jaccard of every pair, then components: copies share nine tenths of their words, others next to nothing."""
    rng = random.Random(7)
    bases = [random_text(seed, 300) for seed in range(12)]
    texts = [with_words_changed(rng.choice(bases), rng.choice([0, 0.003]), seed) for seed in range(60)]
    shards = [{(s << 32) + i: texts[20 * s + i] for i in range(20)} for s in range(3)]
    ids = [i for shard in shards for i in shard]
    text = {i: t for shard in shards for i, t in shard.items()}
    pairs = [(a, b) for a in ids for b in ids if a < b and jaccard_of(text[a], text[b], 5) > 0.5]
    expected = components(pairs, ids)
    job = DedupJob(tmp_path, shards)
    rows = {row["doc_id"]: row for row in job.run()}
    assert {i: rows[i]["cluster"] if i in rows else i for i in ids} == expected
    assert {row["doc_id"] for row in rows.values() if row["kept"]} == {row["cluster"] for row in rows.values()}


def test_injected_exact_copies_are_all_removed_and_the_first_one_stays(tmp_path: Path):
    originals = {i: random_text(i) for i in range(20)}
    copies = {S1 + i: originals[i].upper().replace(" ", " ,\n") for i in range(0, 20, 2)}
    job = DedupJob(tmp_path, [originals, copies])
    rows = job.removed()
    assert list(rows) == list(copies)
    assert {row["reason"] for row in rows.values()} == {"exact_duplicate"}
    assert [row["cluster"] for row in rows.values()] == list(range(0, 20, 2))
    assert {row["cluster_size"] for row in rows.values()} == {2}
    assert job.counts.rejected == {"exact_duplicate": 10, "near_duplicate": 0, "published_duplicate": 0}
    assert job.counts.detail["removed_by_shard"] == {"1": {"exact_duplicate": 10}}
    assert job.counts.detail["cluster_sizes"] == {"2": 10}


def test_near_copies_are_found_and_named_so(tmp_path: Path):
    originals = {i: random_text(i, 400) for i in range(10)}
    near = {S1 + i: originals[i] + " one more sentence at the end" for i in range(5)}
    rows = DedupJob(tmp_path, [originals, near]).removed()
    assert [(i, row["reason"], row["cluster"]) for i, row in rows.items()] == [
        (S1 + i, "near_duplicate", i) for i in range(5)
    ]


def test_every_member_of_a_cluster_is_listed_the_kept_one_without_a_reason(tmp_path: Path):
    text = random_text(1)
    rows = DedupJob(tmp_path, [{3: text, 4: random_text(2), 7: text}]).run()
    assert [(row["doc_id"], row["kept"], row["reason"]) for row in rows] == [
        (3, True, ""),
        (7, False, "exact_duplicate"),
    ]


def test_documents_shorter_than_the_ngram_take_part_in_exact_removal_only(tmp_path: Path):
    rows = DedupJob(tmp_path, [{0: "one two three", 1: "One, two, three!", 2: "one two three four"}]).removed()
    assert [(i, row["reason"]) for i, row in rows.items()] == [(1, "exact_duplicate")]


def test_texts_without_any_word_are_equal_only_if_their_characters_are(tmp_path: Path):
    assert list(DedupJob(tmp_path, [{0: "!!!", 1: "???", 2: "!!!", 3: "", 4: ""}]).removed()) == [2, 4]


def test_a_chain_of_near_copies_is_one_cluster_and_its_exact_copies_are_named_so(tmp_path: Path):
    text = random_text(1, 400)
    shards = [{5: text + " alpha beta"}, {S1: text}, {S2: text + " gamma delta", S2 + 1: text}]
    rows = DedupJob(tmp_path, shards).removed()
    assert set(rows) == {S1, S2, S2 + 1}
    assert {row["cluster"] for row in rows.values()} == {5}
    assert {row["cluster_size"] for row in rows.values()} == {4}
    assert [rows[i]["reason"] for i in (S1, S2, S2 + 1)] == ["near_duplicate", "near_duplicate", "exact_duplicate"]


def test_the_copy_of_the_source_with_the_highest_priority_stays(tmp_path: Path):
    text = random_text(1)
    rows = DedupJob(tmp_path, [{0: text}, {S1: text}, {S2: text}], priorities=[0, 5, 5]).removed()
    assert list(rows) == [0, S2]
    assert {row["cluster"] for row in rows.values()} == {0}
    assert {row["reason"] for row in rows.values()} == {"exact_duplicate"}


def test_the_longest_copy_stays_but_only_among_those_of_the_highest_priority(tmp_path: Path):
    text = random_text(1, 400)
    shards = [{0: text + " alpha beta gamma delta"}, {S1: text, S1 + 1: text + " alpha beta"}]
    assert list(DedupJob(tmp_path / "first", shards).removed()) == [S1, S1 + 1]
    assert list(DedupJob(tmp_path / "longest", shards, keep="longest").removed()) == [S1, S1 + 1]
    assert list(DedupJob(tmp_path / "both", shards, keep="longest", priorities=[0, 1]).removed()) == [0, S1]


@pytest.mark.parametrize("n_partitions", [2, 7])
def test_the_number_of_partitions_does_not_change_the_result(tmp_path: Path, n_partitions: int):
    rng = random.Random(5)
    texts = [random_text(rng.randrange(25), 60) + rng.choice(["", " extra"]) for _ in range(60)]
    shards = [{(s << 32) + i: texts[20 * s + i] for i in range(20)} for s in range(3)]
    expected = DedupJob(tmp_path / "one", shards).run()
    assert DedupJob(tmp_path / "many", shards, n_partitions=n_partitions).run() == expected
    assert 20 < sum(not row["kept"] for row in expected) < 60


def test_an_empty_shard_gives_empty_files(tmp_path: Path):
    assert DedupJob(tmp_path, [{}]).run() == []
    stages = tmp_path / "stages"
    assert pq.read_table(stages / "signatures/000000" / SIGNATURES_FILE).num_rows == 0
    assert pq.read_table(stages / "signatures/000000" / BANDS_FILE).num_rows == 0
    assert pq.read_table(stages / "edges/near-0" / EDGES_FILE).num_rows == 0


def test_a_range_of_documents_is_read_without_the_others(tmp_path: Path):
    text = random_text(1)
    DedupJob(tmp_path, [{0: text, 1: text}, {S1 + 4: text}, {S2: text, S2 + 1: random_text(2)}]).run()
    path = tmp_path / "stages/clusters/all" / CLUSTERS_FILE
    assert read_clusters(path, S1, S2 - 1).column("doc_id").to_pylist() == [S1 + 4]
    assert read_removed(path, 0, S1 - 1).tolist() == [1]
    assert read_clusters(path, S2 + 1, S2 + 9).num_rows == 0


def test_edges_of_other_documents_are_an_error_that_says_what_to_do(tmp_path: Path):
    signed = write_lengths(tmp_path / "signed", {0: 1, 1: 1})
    for k, pair in enumerate([(0, 500), (0, S1), (-S1, 0)]):
        near = write_pairs(tmp_path / f"near{k}", [pair])
        with pytest.raises(DataError, match=r"no signature.*remove stages/edges"):
            write_clusters(tmp_path, [], [near], [signed], [0], "first")
