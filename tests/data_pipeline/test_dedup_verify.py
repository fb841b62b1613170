import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dedup.grouping import EDGES_FILE
from data_pipeline.dedup.minhash import MinHasher, shingle_set
from data_pipeline.dedup.verify import MOST_COMPARISONS, jaccard, write_shingles, write_verified
from megagpt.errors import DataError
from tests.data_pipeline.dedup_job import DedupJob, again
from tests.data_pipeline.dedup_oracle import (
    components,
    jaccard_of,
    random_text,
    shingles_of,
    with_words_changed,
    write_documents,
)
from tests.data_pipeline.test_dedup_clusters import write_pairs


def verified(folder: Path, texts: dict[int, str], stars: list[tuple[int, int]], threshold: float) -> list[tuple]:
    """The edges that hold among those of one partition."""
    documents = write_documents(folder / "docs.parquet", texts)
    near = write_pairs(folder / "near", sorted(stars))
    ids = sorted({i for pair in stars for i in pair})
    write_documents(near / "candidates.parquet", dict.fromkeys(ids, ""))
    write_shingles(folder, documents, [near], 5)
    (folder / "out").mkdir()
    counts = write_verified(folder / "out", near, [folder], threshold)
    assert counts.detail["candidates"] == len(stars)
    rows = pq.read_table(folder / "out" / EDGES_FILE).to_pylist()
    return [(row["root"], row["doc_id"]) for row in rows]


@given(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)))
@settings(deadline=None)
def test_similarity_of_two_sorted_sets_is_that_of_python_sets(a: set[int], b: set[int]):
    x, y = (np.array(sorted(values), np.uint64) for values in (a, b))
    assert jaccard(x, y) == (len(a & b) / len(a | b) if a | b else 0.0)


def test_two_pairs_with_nothing_across_are_two_clusters(tmp_path: Path):
    """A ~ B and C ~ D hold, the bands propose A ~ C and A ~ D as well; text-dedup's check keeps A alone."""
    one, other = random_text(1), random_text(2)
    texts = {0: one, 1: one + " more", 2: other, 3: other + " more"}
    assert verified(tmp_path, texts, [(0, 1), (0, 2), (0, 3)], 0.8) == [(0, 1), (2, 3)]


def test_candidates_that_resemble_nothing_leave_no_edge(tmp_path: Path):
    assert verified(tmp_path, {i: random_text(i) for i in range(5)}, [(0, i) for i in range(1, 5)], 0.3) == []


def test_a_document_that_joins_two_clusters_makes_them_one(tmp_path: Path):
    words = random_text(1, 400).split(" ")
    texts = {0: " ".join(words[:300]), 1: " ".join(words[100:]), 2: " ".join(words)}
    assert jaccard_of(texts[0], texts[1], 5) < 0.7 < jaccard_of(texts[0], texts[2], 5)
    assert verified(tmp_path, texts, [(0, 1), (0, 2)], 0.7) == [(0, 2), (1, 2)]


def test_the_result_is_the_components_of_the_exact_similarity_graph_of_each_star(tmp_path: Path):
    rng = random.Random(3)
    bases = [random_text(seed, 150) for seed in range(4)]
    texts = {i: with_words_changed(rng.choice(bases), rng.choice([0, 0.01, 0.03, 0.08]), i) for i in range(50)}
    stars = [(0, i) for i in range(1, 30)] + [(30, i) for i in range(31, 50)]
    groups = [range(30), range(30, 50)]
    pairs = [(a, b) for g in groups for a in g for b in g if a < b and jaccard_of(texts[a], texts[b], 5) >= 0.7]
    found = verified(tmp_path, texts, stars, 0.7)
    assert set(found) <= set(pairs)
    assert components(found, range(50)) == components(pairs, range(50))
    assert len(set(components(pairs, range(50)).values())) > 8


def test_a_member_of_a_large_star_costs_a_bounded_number_of_comparisons(tmp_path: Path):
    n = 3 * MOST_COMPARISONS
    texts = {i: random_text(i, 8) for i in range(n)} | {n: random_text(0, 8), n + 1: random_text(n, 8)}
    found = verified(tmp_path, texts, [(0, i) for i in range(1, n + 2)], 0.8)
    assert found == [(0, n)]


def test_only_verified_pairs_are_removed_in_a_job_whose_bands_propose_far_too_much(tmp_path: Path):
    rng = random.Random(9)
    bases = [random_text(seed, 100, vocabulary=30) for seed in range(8)]
    texts = [with_words_changed(rng.choice(bases), rng.choice([0, 0.01, 0.05]), seed) for seed in range(60)]
    shards = [{(s << 32) + i: texts[20 * s + i] for i in range(20)} for s in range(3)]
    text = {i: t for shard in shards for i, t in shard.items()}
    job = DedupJob(tmp_path / "bands", shards, MinHasher(1, 8, 1), n_partitions=2)
    checked = again(job, out=tmp_path / "checked", verify=0.8)
    unverified, rows = job.run(), checked.run()
    assert {row["cluster"] for row in unverified} == {min(text)}
    similar = [(a, b) for a in text for b in text if a < b and jaccard_of(text[a], text[b], 1) >= 0.8]
    expected = components(similar, list(text))
    assert {row["doc_id"]: row["cluster"] for row in rows} == {
        i: root for i, root in expected.items() if list(expected.values()).count(root) > 1
    }


def test_shingle_sets_are_written_for_candidates_only(tmp_path: Path):
    texts = {i: random_text(i, 20) for i in range(6)}
    verified(tmp_path, texts, [(1, 4)], 0.5)
    assert np.load(tmp_path / "shingle_doc_ids.npy").tolist() == [1, 4]
    ends, hashes = np.load(tmp_path / "shingle_ends.npy"), np.load(tmp_path / "shingles.npy")
    assert [hashes[ends[i] : ends[i + 1]].tolist() for i in range(2)] == [
        sorted(set(shingles_of(texts[i], 5))) for i in (1, 4)
    ]
    assert shingle_set(np.frombuffer(b"too few words", np.uint8), 5).tolist() == []


def test_shingles_of_another_run_are_an_error_that_says_what_to_do(tmp_path: Path):
    verified(tmp_path, {i: random_text(i) for i in range(3)}, [(0, 1)], 0.5)
    other = write_pairs(tmp_path / "other", [(0, 2)])
    with pytest.raises(DataError, match=r"document 2 .* remove stages/shingles"):
        write_verified(tmp_path / "out", other, [tmp_path], 0.5)
