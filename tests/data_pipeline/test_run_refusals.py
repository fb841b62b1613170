"""What a run refuses before it works for hours, and says of jobs that come to nothing."""

import errno
import json

import pytest

from data_pipeline.config import DataJob
from data_pipeline.executors.stage_run import StageRun
from data_pipeline.run import plan_job, run_job
from data_pipeline.tasks import Task, read_record
from megagpt.errors import DataError

TEXT = "The people of this place have to look for water in the other river, and that is a small number of them. " * 9


@pytest.fixture
def values(tmp_path):
    texts = [f"{TEXT} Number {i} of them. {'river ' * i}" for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {
        "out": str(tmp_path / "out"),
        "sources": [str(tmp_path / "a.jsonl")],
        "language": {"enabled": False},
        "filters": {},
        "dedup": {"exact": False, "minhash": False},
        "tokenizer": {"vocab_size": 300},
        "pack": {"val_fraction": 0.2, "test_fraction": 0.2},
        "workers": 1,
    }


def job_of(values, **changes):
    return DataJob.model_validate_json(json.dumps({**values, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filters": {"classifier": {"model": "absent.npz"}}}, "filters.classifier: absent.npz: no such file"),
        ({"dedup": {"against": ["absent"]}}, "dedup.against: absent: no manifest.json"),
        ({"language": {"model": "absent.ftz"}}, "language.model: absent.ftz: no such file"),
    ],
)
def test_what_is_named_and_absent_is_missed_before_the_first_stage(values, tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        run_job(job_of(values, **changes))
    assert not (tmp_path / "out").exists()


def test_a_job_that_comes_to_nothing_names_the_damage(values, tmp_path):
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"no document is left .*damaged: .*broken\.parquet at "):
        run_job(job_of(values, sources=[str(broken)]))


def test_a_plan_tells_stages_without_tasks_from_those_that_will_run(values):
    job = job_of(values)
    run_job(job, until="filter")
    lines = dict(line.split(None, 1) for line in plan_job(job).splitlines() if line.startswith("  "))
    assert lines["extract"] == "no tasks"
    assert lines["signatures"].startswith("0 of 1 task(s) reused; not done yet")
    assert lines["encode"] == "will run; depends on the stages before it"
    run_job(job)
    lines = dict(line.split(None, 1) for line in plan_job(job).splitlines() if line.startswith("  "))
    assert {stage for stage, said in lines.items() if said == "no tasks"} >= {"published", "edges", "units"}
    assert lines["manifest"] == "1 of 1 task(s) reused"


def test_what_follows_a_reused_task_is_the_same_as_after_a_run_one(values, tmp_path):
    """A record hands on what its task said in the task's own order."""
    sources = [{"path": str(tmp_path / "a.jsonl"), "name": name} for name in ("Zebra", "apple", "Mango tree")]
    job = job_of(values, sources=sources, pack={**values["pack"], "per_source": True})
    whole = run_job(job).report
    mixture, manifest = ((job.out / name).read_bytes() for name in ("mixture.yaml", "manifest.json"))
    (job.out / "manifest.json").unlink()
    again = run_job(job)
    assert again.ran["manifest"] == 1
    assert again.ran["pack"] == 0
    assert (job.out / "mixture.yaml").read_bytes() == mixture
    assert (job.out / "manifest.json").read_bytes() == manifest
    assert list(again.report["splits"]) == list(whole["splits"]) == ["train", "val", "test"]
    assert list(again.report["sources"]) == list(whole["sources"])
    record = read_record(job.out / "stages" / "pack" / "all.json")
    assert list(record.counts.detail["splits"]) == ["train", "val", "test"]


def test_a_job_of_nothing_but_published_documents_says_so(values, tmp_path):
    dedup = {"exact": True, "minhash": False}
    run_job(job_of(values, dedup=dedup))
    again = job_of(values, out=str(tmp_path / "again"), dedup={**dedup, "against": [values["out"]]})
    with pytest.raises(DataError, match=r"of 30 documents .* none is left .*published_duplicate 30.*dedup\.against"):
        run_job(again)


def test_a_full_disk_says_what_to_do(tmp_path):
    task = Task("filter", "000000", "a.jsonl", print, (), {}, "", {}, tmp_path)
    stage = StageRun([task], tmp_path, lambda *_: None)
    with pytest.raises(DataError, match=r"filter 000000 \(a\.jsonl\): .*No space left.*free some space and run"):
        stage.settle(task, OSError(errno.ENOSPC, "No space left on device"))
