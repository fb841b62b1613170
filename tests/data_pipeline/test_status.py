import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.config import DataJob
from data_pipeline.executors.local import LocalExecutor
from data_pipeline.executors.progress import StageProgress
from data_pipeline.job_sources import plan_shards
from data_pipeline.plan_counts import count_documents, describe
from data_pipeline.run import plan_job, run_job
from data_pipeline.stages.order import STAGES
from data_pipeline.status import StageTasks, note_tasks, status
from data_pipeline.tasks import Counts, Task, commit, execute
from megagpt.errors import ConfigError, DataError
from tests.data_pipeline import executor_tasks as tasks

TEXT = "The words of this text are with that and to have been, number {}, for the sake of a count of bytes."


def job_over(paths: list[Path], out: Path, **changes) -> DataJob:
    values = {
        "out": str(out),
        "sources": [str(path) for path in paths],
        "language": {"keep": [], "min_score": 0.0},
        "filters": {},
        "tokenizer": {"vocab_size": 300},
        "pack": {"val_fraction": 0.2},
        "workers": 1,
    }
    return DataJob.model_validate_json(json.dumps({**values, **changes}))


def write_jsonl(path: Path, n: int, start: int = 0) -> Path:
    lines = [json.dumps({"text": " ".join([TEXT.format(7 * i + start)] * (1 + i % 5))}) for i in range(n)]
    content = ("\n".join(lines) + "\n").encode()
    path.write_bytes(zstandard.compress(content) if path.suffix == ".zst" else content)
    return path


def reject_some(folder: Path, progress=None) -> Counts:
    return Counts(10, 7, {"filter.rule": 2, "language.not_kept": 1})


def finish(job_folder: Path, stage: str, partition: str) -> None:
    one = Task(stage, partition, "x", reject_some, (), {}, "code", {}, Path("stages") / stage / partition)
    commit(one, execute(one, job_folder), job_folder)


def progress_file(job_folder: Path, **changes) -> None:
    """Of a process that is older than these tests, the first one, unless `changes` name another."""
    now = time.time()
    here = StageProgress(1, socket.gethostname(), "filter", 3, 8, 250_000_000, 1_000_000_000, 5000, 1, now - 50, now)
    values = dataclasses.asdict(dataclasses.replace(here, **changes))
    (job_folder / "stages").mkdir(parents=True, exist_ok=True)
    (job_folder / "stages/progress.json").write_text(json.dumps(values))


def test_the_running_stage_has_a_bar_speeds_and_the_time_that_is_left(tmp_path: Path):
    finish(tmp_path, "filter", "000000")
    finish(tmp_path, "edges", "left-by-another-configuration")
    note_tasks(tmp_path, {"filter": StageTasks(10, 2)})
    progress_file(tmp_path)
    page = status(tmp_path)
    assert "  filter        5 of 10 task(s) done           10 documents in            7 out" in page
    assert "[######------------------]  25%  250.0 of 1,000.0 MB  5.00 MB/s  100 documents/s  0:02:30 left" in page
    assert "1 worker(s) lost, their tasks tried again" in page
    assert "  blocklist     no tasks\n" in page
    assert "  edges         to do\n" in page
    assert "  rejected               2 filter.rule\n  rejected               1 language.not_kept\n" in page
    assert page.endswith(f"running: process 1 on {socket.gethostname()}, last sign of life 0 s ago\n")


def test_a_job_that_was_killed_is_told_from_one_that_hangs_and_one_on_another_machine(tmp_path: Path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    hour_ago = time.time() - 3600
    progress_file(tmp_path, pid=gone.pid, updated=hour_ago)
    assert f"no sign of life for 1:00:00: process {gone.pid} on" in status(tmp_path)
    assert status(tmp_path).endswith("is gone; run the same command again\n")
    progress_file(tmp_path, pid=os.getpid(), started=hour_ago, updated=hour_ago)
    assert status(tmp_path).endswith("is gone; run the same command again\n"), "a later process of the same number"
    progress_file(tmp_path, updated=time.time() - 30)
    assert "no sign of life for 30 s from process" in status(tmp_path)
    progress_file(tmp_path, host="node17", updated=hour_ago)
    assert "on node17; if it was killed, run the same command again" in status(tmp_path)


def test_status_can_be_asked_while_a_job_runs(tmp_path: Path):
    pages = []
    jobs = [tasks.task(0, tasks.fine, 0), *(tasks.task(n, tasks.slow, n) for n in (1, 2, 3))]
    jobs = [dataclasses.replace(one, stage="filter") for one in jobs]
    running = threading.Thread(target=tasks.run, args=(LocalExecutor(2), tmp_path, jobs))
    (tmp_path / "stages").mkdir()
    running.start()
    while running.is_alive():
        pages.append(status(tmp_path))
        time.sleep(0.1)
    assert any("of 4 task(s) done" in page and f"running: process {os.getpid()} on" in page for page in pages)
    assert any("documents/s" in page and " left" in page for page in pages)
    assert "running" not in status(tmp_path)
    assert "4 task(s) done" in status(tmp_path)


def test_a_job_can_stop_after_a_stage_and_go_on(tmp_path: Path):
    job = job_over([write_jsonl(tmp_path / "a.jsonl", 40), write_jsonl(tmp_path / "b.jsonl", 40, 3)], tmp_path / "job")
    with pytest.raises(ConfigError, match=r"no stage is called 'map'; the stages are, in this order: .*filter, sign"):
        run_job(job, until="map")
    assert not (tmp_path / "job").exists()
    summary = run_job(job, until="filter")
    assert summary.report == {}
    assert {stage for stage, n in summary.ran.items() if n} == {"filter"}
    page = status(tmp_path / "job")
    assert "  filter        2 of 2 task(s) done" in page
    assert f"  {STAGES[-1]:<13} to do\n" in page
    assert page.endswith("not finished: run the same command again\n")
    summary = run_job(job)
    assert summary.ran["filter"] == 0
    page = status(tmp_path / "job")
    assert "warning" in page
    assert page.endswith(f"finished; report: {tmp_path / 'job' / 'report.html'}\n")


def test_a_folder_without_a_job_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match="no data job here"):
        status(tmp_path)


def test_the_plan_counts_parquet_rows_and_small_files_exactly(tmp_path: Path):
    pq.write_table(pa.table({"text": [TEXT] * 30_000}), tmp_path / "rows.parquet", row_group_size=1000)
    job = job_over([tmp_path / "rows.parquet", write_jsonl(tmp_path / "few.jsonl.zst", 123)], tmp_path / "job")
    by_name = {one.source: one for one in count_documents(plan_shards(job))}
    assert (by_name["rows"].documents, by_name["rows"].exact) == (30_000, True)
    assert (by_name["few"].documents, by_name["few"].exact) == (123, True)
    assert by_name["rows"].text_bytes == 30_000 * len(TEXT)
    plan = plan_job(job)
    assert "  rows: 30,000 documents, about 3.0 MB of text, about 0.7 million tokens before filters" in plan
    assert "  few: 123 documents" in plan
    assert plan_job(job, "filter").splitlines()[-1].split()[0] == "filter"
    with pytest.raises(ConfigError, match="no stage is called 'nope'; the stages are, in this order: blocklist"):
        plan_job(job, "nope")


def test_what_is_too_large_to_read_is_estimated_and_says_so(tmp_path: Path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(25):
        write_jsonl(corpus / f"{number:02d}.jsonl", 100 + 10 * number, number)
    large = write_jsonl(tmp_path / "large.jsonl", 60_000)
    compressed = write_jsonl(tmp_path / "compressed.jsonl.zst", 60_000)
    counted = count_documents(plan_shards(job_over([corpus, large, compressed], tmp_path / "job")))
    by_name = {one.source: one for one in counted}
    assert not any(one.exact for one in counted[:2])
    assert by_name["corpus"].documents == pytest.approx(sum(100 + 10 * n for n in range(25)), rel=0.1)
    assert by_name["corpus"].n_sampled == 6
    assert by_name["large"].documents == pytest.approx(60_000, rel=0.02)
    assert by_name["large"].text_bytes == pytest.approx(large.stat().st_size - 60_000 * 13, rel=0.02)
    assert by_name["compressed"].documents == pytest.approx(60_000, rel=0.1)
    assert "about" in describe(counted)[0]
    assert "documents (estimated from 6 of 25 shards)" in describe(counted)[0]


def test_the_plan_of_a_source_without_its_text_column_is_an_error(tmp_path: Path):
    pq.write_table(pa.table({"body": [TEXT]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="no column 'text'"):
        plan_job(job_over([tmp_path / "rows.parquet"], tmp_path / "job"))
