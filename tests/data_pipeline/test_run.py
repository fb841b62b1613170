import fcntl
import io
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from data_pipeline.config import DataJob
from data_pipeline.run import plan_job, run_job
from data_pipeline.tasks import read_record
from megagpt.config.load import dump_config
from megagpt.data.indexed import TokenFile
from megagpt.data.manifest import read_manifest, verify_token_file
from megagpt.errors import DataError
from megagpt.tokenizer import open_tokenizer

REPO = Path(__file__).resolve().parents[2]
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "was",
    "that",
    "for",
    "with",
    "as",
    "on",
    "be",
    "at",
    "by",
    "this",
    "had",
]
RESULTS = ("tokens_train.bin", "tokens_train.idx", "tokens_val.bin", "tokens_val.idx", "manifest.json")


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) + rng.choice(["", "", "s", "ed", "ing"]) for _ in range(15)).capitalize() + "."


def write_corpus(folder: Path, n_shards: int = 3, n_documents: int = 30) -> Path:
    """Shards of unique documents; the last two documents of each are an exact and a near copy of its first."""
    rng = random.Random(7)
    folder.mkdir(parents=True)
    for s in range(n_shards):
        texts = [" ".join(sentence(rng) for _ in range(rng.randint(10, 20))) for _ in range(n_documents - 2)]
        texts += [texts[0].upper(), texts[0] + " One more sentence, and <|endoftext|> as letters."]
        (folder / f"{s}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


def job_for(corpus: Path, out: Path, **changes) -> DataJob:
    values = {
        "out": out,
        "sources": [{"path": str(corpus), "name": "web"}],
        "language": {"keep": [], "min_score": 0.0},
        "filters": {},
        "tokenizer": {"vocab_size": 350},
        "pack": {"val_fraction": 0.1},
        "workers": 1,
    }
    return DataJob.model_validate_json(json.dumps({**values, **changes}, default=str))


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> DataJob:
    """A job that ran once without interruption."""
    job = job_for(corpus, tmp_path_factory.mktemp("finished") / "job")
    run_job(job)
    return job


def results(out: Path) -> dict[str, bytes]:
    tokenizer = {"tokenizer": (out / "tokenizer/tokenizer.json").read_bytes()}
    return {**tokenizer, **{name: (out / name).read_bytes() for name in RESULTS}}


def output_hashes(out: Path) -> dict[str, object]:
    """What every record of the job names as outputs, by stage and partition."""
    paths = sorted(path for path in (out / "stages").glob("*/*.json"))
    return {f"{path.parent.name}/{path.stem}": read_record(path).outputs for path in paths}


def run_and_listen(job: DataJob) -> tuple[str, object]:
    stream = io.StringIO()
    summary = run_job(job, Console(file=stream, width=200))
    return stream.getvalue(), summary


def test_token_files_hold_the_documents_that_the_manifest_and_the_report_count(finished: DataJob):
    report = json.loads((finished.out / "report.json").read_text())
    manifest = read_manifest(finished.out)
    tokenizer = open_tokenizer(finished.out / "tokenizer")
    assert manifest.tokenizer["fingerprint"] == tokenizer.fingerprint
    assert "out" not in manifest.job
    total = 0
    for split in ("train", "val"):
        prefix = finished.out / f"tokens_{split}"
        verify_token_file(prefix)
        file = TokenFile.open(prefix)
        documents = [file.document(i).tolist() for i in range(file.n_documents)]
        assert all(document.count(tokenizer.eot_id) == 1 and document[-1] == tokenizer.eot_id for document in documents)
        texts = [tokenizer.decode(document[:-1]) for document in documents]
        assert sum(len(text.encode()) for text in texts) == manifest.files[prefix.name].text_bytes
        assert report["splits"][split]["documents"] == len(documents)
        assert report["splits"][split]["tokens"] == file.n_tokens
        total += len(documents)
    web = report["sources"]["web"]
    assert (web["records"], web["lost"], web["packed"]) == (90, {"exact_duplicate": 3, "near_duplicate": 3}, 84)
    assert total == 84
    assert report["dedup"]["cluster_sizes"] == {"2": 0, "3-4": 3}


def test_a_second_run_does_nothing_says_so_and_is_quick(finished: DataJob):
    before = output_hashes(finished.out)
    started = time.perf_counter()
    said, summary = run_and_listen(finished)
    assert time.perf_counter() - started < 2
    assert summary.nothing_to_do
    n_tasks = sum(summary.reused.values())
    assert f"nothing to do: all {n_tasks} tasks were done and their outputs are intact" in said
    assert output_hashes(finished.out) == before


def test_two_workers_give_the_same_bytes_as_one(corpus: Path, finished: DataJob, tmp_path: Path):
    job = job_for(corpus, tmp_path / "job", workers=2)
    run_job(job)
    assert results(job.out) == results(finished.out)
    assert output_hashes(job.out) == output_hashes(finished.out)


def test_killed_at_any_moment_and_started_again_it_ends_with_the_same_bytes(
    corpus: Path, finished: DataJob, tmp_path: Path
):
    job = job_for(corpus, tmp_path / "job", workers=2)
    config = tmp_path / "job.yaml"
    config.write_text(dump_config(job))
    command = [sys.executable, str(Path(__file__).with_name("run_a_job.py")), str(config)]
    rng = random.Random(11)
    killed = 0
    for longest in (0.3, 1.5):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPO)
        assert process.stdout.readline() == b"started\n"
        time.sleep(rng.uniform(0.3, 1.0) * longest)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert killed > 0
    run_job(job)
    assert results(job.out) == results(finished.out)
    assert output_hashes(job.out) == output_hashes(finished.out)
    assert not (job.out / "scratch").exists()


def test_a_changed_configuration_runs_its_stage_and_what_follows_and_says_why(corpus: Path, tmp_path: Path):
    run_job(job_for(corpus, tmp_path))
    said, summary = run_and_listen(job_for(corpus, tmp_path, dedup={"ngram": 4}))
    assert "dedup.minhash.ngram 5 -> 4" in said
    assert (summary.ran["filter"], summary.ran["signatures"]) == (0, 3)
    said, summary = run_and_listen(job_for(corpus, tmp_path, dedup={"ngram": 4}, pack={"val_fraction": 0.2, "seed": 9}))
    assert {stage for stage, n in summary.ran.items() if n} == {"pack", "manifest"}
    assert "pack.seed 1234 -> 9, pack.val_fraction 0.1 -> 0.2" in said
    # And the result is that of a job that never knew another configuration.
    fresh = job_for(corpus, tmp_path / "fresh", dedup={"ngram": 4}, pack={"val_fraction": 0.2, "seed": 9})
    run_job(fresh)
    assert results(fresh.out) == results(tmp_path)


def test_a_changed_input_file_runs_its_shard_again_and_no_other(tmp_path: Path):
    folder = write_corpus(tmp_path / "corpus")
    run_job(job_for(folder, tmp_path / "job"))
    lines = (folder / "1.jsonl").read_text().splitlines(keepends=True)
    (folder / "1.jsonl").write_text("".join(lines[:-1]))
    _, summary = run_and_listen(job_for(folder, tmp_path / "job"))
    assert (summary.ran["filter"], summary.reused["filter"]) == (1, 2)
    assert summary.report["sources"]["web"]["records"] == 89


@pytest.mark.parametrize(
    "file",
    [
        "stages/filter/000001/docs.parquet",
        "stages/edges/near-0000/edges.parquet",
        "stages/documents/000002/docs.parquet",
    ],
)
def test_a_truncated_intermediate_file_is_noticed_and_made_again(
    corpus: Path, finished: DataJob, tmp_path: Path, file: str
):
    job = job_for(corpus, tmp_path)
    run_job(job)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[:-10])
    said, _ = run_and_listen(job)
    assert f"has {len(content) - 10} bytes instead of {len(content)}" in said.replace("\n", "")
    assert (tmp_path / file).read_bytes() == content
    assert results(tmp_path) == results(finished.out)


def test_a_lost_token_file_is_made_again(corpus: Path, finished: DataJob, tmp_path: Path):
    job = job_for(corpus, tmp_path)
    run_job(job)
    (tmp_path / "tokens_val.idx").unlink()
    _, summary = run_and_listen(job)
    assert {stage for stage, n in summary.ran.items() if n} == {"pack", "manifest"}
    assert results(tmp_path) == results(finished.out)


def test_of_two_sources_the_copy_of_the_earlier_one_is_kept(tmp_path: Path):
    folder = write_corpus(tmp_path / "corpus", n_shards=1)
    lines = (folder / "0.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[10:20]))
    (tmp_path / "b.jsonl").write_text("".join(lines[:20]))
    for order in ("ab", "ba"):
        sources = [str(tmp_path / f"{name}.jsonl") for name in order]
        job = job_for(folder, tmp_path / order, sources=sources, pack={"val_fraction": 0.3})
        sources_of_report = run_job(job).report["sources"]
        packed = {name: values["packed"] for name, values in sources_of_report.items()}
        assert packed == ({"a": 10, "b": 10} if order == "ab" else {"b": 20, "a": 0})


def test_a_shard_that_cannot_be_read_is_named_and_the_finished_ones_are_kept(tmp_path: Path):
    folder = write_corpus(tmp_path / "corpus")
    (folder / "2.jsonl").rename(tmp_path / "2.jsonl")
    pq.write_table(pa.table({"body": ["a text in a column of another name"]}), folder / "2.parquet")
    with pytest.raises(DataError, match=r"filter 000002 \(.*2\.parquet\)"):
        run_job(job_for(folder, tmp_path / "job"))
    (folder / "2.parquet").unlink()
    (tmp_path / "2.jsonl").rename(folder / "2.jsonl")
    _, summary = run_and_listen(job_for(folder, tmp_path / "job"))
    assert summary.reused["filter"] == 2


def test_two_runs_do_not_write_the_same_folder(corpus: Path, tmp_path: Path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another data job is writing here"):
            run_job(job_for(corpus, tmp_path))


def test_a_corpus_too_small_for_the_vocabulary_is_a_warning(tmp_path: Path):
    folder = write_corpus(tmp_path / "corpus", n_shards=1)
    said, summary = run_and_listen(job_for(folder, tmp_path / "job", tokenizer={"vocab_size": 30_000}))
    assert any("tokens instead of 30000" in warning for warning in summary.warnings)
    assert "warning: the tokenizer has" in said


def test_another_kind_of_tokenizer_replaces_the_first_one(corpus: Path, finished: DataJob, tmp_path: Path):
    run_job(job_for(corpus, tmp_path, tokenizer={"vocab_size": 300}))
    file = finished.out / "tokenizer/tokenizer.json"
    run_job(job_for(corpus, tmp_path, tokenizer={"kind": "file", "file": str(file)}))
    assert read_manifest(tmp_path).tokenizer == read_manifest(finished.out).tokenizer
    assert (tmp_path / "tokens_train.bin").read_bytes() == (finished.out / "tokens_train.bin").read_bytes()


def test_without_deduplication_every_document_is_packed(corpus: Path, tmp_path: Path):
    report = run_job(job_for(corpus, tmp_path, dedup={"exact": False, "minhash": False})).report
    assert report["sources"]["web"]["packed"] == 90


def test_the_plan_lists_shards_and_what_is_reused_and_writes_nothing(corpus: Path, finished: DataJob, tmp_path: Path):
    plan = " ".join(plan_job(job_for(corpus, tmp_path / "absent")).split())
    assert not (tmp_path / "absent").exists()
    assert "000002 jsonl" in plan
    assert "filter 0 of 3 task(s) reused; not done yet" in plan
    assert "pack will run; depends on the stages before it" in plan
    plan = " ".join(plan_job(job_for(corpus, finished.out, pack={"val_fraction": 0.3})).split())
    assert "encode 3 of 3 task(s) reused" in plan
    assert "pack 0 of 1 task(s) reused; configuration changed: pack.val_fraction 0.1 -> 0.3" in plan


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(corpus: Path, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "job"):
        with pytest.raises(DataError, match="the job cannot work in this folder"):
            run_job(job_for(corpus, out))


def test_a_damaged_report_is_written_again(finished: DataJob):
    whole = json.loads((finished.out / "report.json").read_text())
    (finished.out / "report.json").write_text("{")
    assert run_job(finished).nothing_to_do
    again = json.loads((finished.out / "report.json").read_text())
    assert (again["sources"], again["splits"]) == (whole["sources"], whole["splits"])


def test_where_nothing_is_kept_the_reasons_are_named(tmp_path: Path):
    folder = write_corpus(tmp_path / "corpus", n_shards=1)
    sources = [{"path": str(folder), "text_key": "body"}]
    with pytest.raises(
        DataError, match=r"of 30 records no document is left .*\(json.no_text_key 30; damaged: .*0.jsonl at line 1: "
    ):
        run_job(job_for(folder, tmp_path / "job", sources=sources))


@pytest.mark.parametrize(
    ("section", "values"), [("tokenizer", {"kind": "file", "file": "no.json"}), ("language", {"model": "no.ftz"})]
)
def test_a_named_file_that_is_absent_is_missed_before_any_work(corpus: Path, tmp_path: Path, section: str, values):
    with pytest.raises(DataError, match=rf"{section}\.(file|model): no\..*: no such file"):
        run_job(job_for(corpus, tmp_path / "job", **{section: values}))
    assert not (tmp_path / "job").exists()
