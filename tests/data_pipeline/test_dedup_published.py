from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_pipeline.dedup.minhash import MinHasher
from data_pipeline.dedup.published import published_shards
from data_pipeline.dedup.signatures import BANDS_FILE, SIGNATURES_FILE
from megagpt.errors import DataError
from tests.data_pipeline.dedup_job import HASHER, DedupJob, again
from tests.data_pipeline.dedup_oracle import random_text

S1 = 1 << 32
OLD, NEW = random_text(1, 400), random_text(2, 400)


def published_job(folder: Path) -> DedupJob:
    """Two shards; its document S1 is a copy that went."""
    job = DedupJob(folder, [{0: random_text(90), 3: OLD}, {S1: OLD, S1 + 5: random_text(91)}])
    assert list(job.removed()) == [S1]
    return job


def test_all_copies_of_a_published_document_go_exact_and_near_and_others_stay(tmp_path: Path):
    published = published_job(tmp_path / "published")
    shards = [{0: OLD, 1: NEW, 2: random_text(91)}, {S1: OLD + " one word more", S1 + 1: OLD, S1 + 2: NEW}]
    job = DedupJob(tmp_path / "job", shards, against=[published.out])
    rows = job.removed()
    assert {i: row["reason"] for i, row in rows.items()} == {
        0: "published_duplicate",
        2: "published_duplicate",
        S1: "published_duplicate",
        S1 + 1: "published_duplicate",
        S1 + 2: "exact_duplicate",
    }
    assert {rows[i]["cluster"] for i in (0, S1, S1 + 1)} == {0}
    assert {rows[i]["cluster_size"] for i in (0, S1, S1 + 1)} == {4}
    assert (rows[2]["cluster"], rows[2]["cluster_size"]) == (2, 2)
    assert job.counts.rejected == {"exact_duplicate": 1, "near_duplicate": 0, "published_duplicate": 4}
    assert (job.counts.documents_in, job.counts.documents_out) == (6, 1)


def test_two_published_jobs_with_the_same_ids_do_not_get_mixed_up(tmp_path: Path):
    first = DedupJob(tmp_path / "first", [{0: OLD}])
    second = DedupJob(tmp_path / "second", [{0: NEW}])
    first.run(), second.run()
    shards = [{0: random_text(7), 1: OLD, 2: NEW, 3: random_text(8)}]
    one = DedupJob(tmp_path / "one", shards, against=[first.out])
    both = again(one, out=tmp_path / "both", against=[first.out, second.out])
    assert list(one.removed()) == [1]
    assert list(both.removed()) == [1, 2]
    assert {row["cluster_size"] for row in both.run()} == {2}


def test_a_job_run_against_a_job_that_was_run_against_another_removes_what_each_of_them_kept(tmp_path: Path):
    first = DedupJob(tmp_path / "first", [{0: OLD}])
    first.run()
    second = DedupJob(tmp_path / "second", [{0: OLD, 1: NEW}], against=[first.out])
    assert list(second.removed()) == [0]
    shards = [{0: NEW, 1: OLD}]
    assert list(DedupJob(tmp_path / "third", shards, against=[second.out]).removed()) == [0]
    assert list(DedupJob(tmp_path / "fourth", shards, against=[second.out, first.out]).removed()) == [0, 1]


def test_priorities_and_lengths_do_not_save_a_copy_of_a_published_document(tmp_path: Path):
    published = published_job(tmp_path / "published")
    job = DedupJob(tmp_path / "job", [{0: OLD + " longer"}], priorities=[100], keep="longest", against=[published.out])
    assert list(job.removed()) == [0]


def test_candidates_are_verified_against_the_published_texts(tmp_path: Path):
    published = published_job(tmp_path / "published")
    half = " ".join(OLD.split(" ")[:200] + NEW.split(" ")[200:])
    shards = [{0: half, 1: OLD + " one word more", 2: random_text(3)}]
    many_bands = MinHasher(5, 60, 1)
    DedupJob(published.out, published.shards, many_bands).run()
    job = DedupJob(tmp_path / "bands", shards, many_bands, against=[published.out])
    assert list(job.removed()) == [0, 1]
    assert list(again(job, out=tmp_path / "checked", verify=0.8).removed()) == [1]


def test_what_is_copied_are_the_kept_documents_under_negative_ids(tmp_path: Path):
    published = published_job(tmp_path / "published")
    job = DedupJob(tmp_path / "job", [{0: NEW}], against=[published.out])
    assert job.run() == []
    copied = sorted((job.out / "stages/published").glob("published-*/"))
    ids = [pq.read_table(folder / SIGNATURES_FILE).column("doc_id").to_pylist() for folder in copied]
    assert ids == [[-S1, -S1 + 3], [-2 * S1 + 5]]
    bands = [pq.read_table(folder / BANDS_FILE).column("doc_id").to_pylist() for folder in copied]
    assert [sorted(set(b)) for b in bands] == ids


def test_other_minhash_parameters_are_an_error_that_names_both(tmp_path: Path):
    published = published_job(tmp_path / "published")
    with pytest.raises(DataError, match=r'"bands": 14, "ngram": 5, "rows": 8.*"bands": 20, "ngram": 5, "rows": 5'):
        published_shards([published.out], MinHasher(5, 20, 5))
    assert [shard.ordinal for shard in published_shards([published.out], None)] == [-1, -2]


def test_a_folder_that_is_no_finished_job_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere, which is no finished job"):
        published_shards([tmp_path / "nowhere"], HASHER)
    published = published_job(tmp_path / "published")
    (published.out / "manifest.json").unlink()
    with pytest.raises(DataError, match="no finished job"):
        published_shards([published.out], HASHER)
