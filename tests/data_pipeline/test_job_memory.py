"""A whole job at ten times the input: its workers need no more memory."""

import random
import sys
from pathlib import Path

import psutil
import pytest

from data_pipeline.bench.corpora import write_shards
from megagpt.config.load import dump_config
from tests.data_pipeline.test_run import REPO, WORDS, job_for

BILLION = 10**9


def write_texts(folder: Path, n_documents: int) -> None:
    """About 5 kB each in one shard; some lines and passages come again, a tenth are near copies of others."""
    rng = random.Random(3)
    words = WORDS + [f"{word}{ending}" for word in WORDS for ending in ("s", "ed", "ing", "ness", "ly")]
    words += ["".join(rng.choices("abcdefghijklmnop", k=7)) for _ in range(5000)]
    lines = [" ".join(rng.choices(words, k=18)).capitalize() + "." for _ in range(200)]
    rows: list[tuple[str, str]] = []
    for i in range(n_documents):
        if i % 10 == 9:
            rows.append((str(i), rows[-rng.randint(1, 9)][1] + " And one more sentence at the end of it."))
        else:
            text = [" ".join(rng.choices(words, k=18)).capitalize() + "." for _ in range(38)]
            rows.append((str(i), "\n".join([*text, *rng.choices(lines, k=2)])))
    write_shards(folder, rows, n_shards=1)


def peak_of_a_job(folder: Path, n_documents: int) -> tuple[int, int]:
    """(largest worker, the parent) in bytes of resident memory, looked at twenty times a second."""
    write_texts(folder / "corpus", n_documents)
    job = job_for(
        folder / "corpus",
        folder / "job",
        filters={"gopher_repetition": {}, "gopher_quality": {}, "c4": {}, "fineweb": {}},
        dedup={"verify_jaccard": 0.7, "units": "line", "substring_tokens": 50},
        tokenizer={"vocab_size": 2048, "sample_bytes": 5_000_000},
        workers=2,
    )
    (folder / "job.yaml").write_text(dump_config(job))
    command = [str(Path(sys.executable).with_name("megagpt")), "data", "run", str(folder / "job.yaml")]
    workers = parent = 0
    with psutil.Popen(command, cwd=REPO, stdout=-3, stderr=-3) as process:
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            for each in (process, *process.children(recursive=True)):
                try:
                    rss_bytes = each.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
                if each.pid == process.pid:
                    parent = max(parent, rss_bytes)
                else:
                    workers = max(workers, rss_bytes)
            try:
                process.wait(0.05)
            except psutil.TimeoutExpired:
                continue
        assert process.wait() == 0
    return workers, parent


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_ten_times_the_input_takes_no_more_memory(tmp_path: Path) -> None:
    small = peak_of_a_job(tmp_path / "small", 4_000)
    large = peak_of_a_job(tmp_path / "large", 40_000)
    assert max(*small, *large) < BILLION, (small, large)
    print(small, large)  # noqa: T201 - figures for whoever runs it
