import dataclasses
import json
from pathlib import Path

import pytest

from data_pipeline.tasks import (
    Counts,
    Task,
    check_conservation,
    commit,
    execute,
    hash_json,
    read_record,
    why_not_reused,
)
from megagpt.errors import DataError


def write_greeting(folder: Path, text: str, progress=None) -> Counts:
    (folder / "greeting.txt").write_text(text)
    return Counts(3, 2, {"short": 1})


def lose_a_document(folder: Path, text: str, progress=None) -> Counts:
    return Counts(3, 2)


TASK = Task(
    stage="greet",
    partition="000000",
    subject="shard.jsonl",
    work=write_greeting,
    arguments=("hello",),
    config={"dedup": {"ngram": 5}},
    code="code1",
    inputs={"shard": "aaaa"},
    target=Path("stages/greet/000000"),
)


def run(task: Task, job: Path) -> None:
    commit(task, execute(task, job), job)


def reason(task: Task, job: Path) -> str | None:
    return why_not_reused(task, read_record(task.record_path(job)), job)


def test_a_task_is_reused_only_when_done_with_equal_hashes(tmp_path: Path):
    assert reason(TASK, tmp_path) == "not done yet"
    run(TASK, tmp_path)
    assert reason(TASK, tmp_path) is None
    assert (tmp_path / "stages/greet/000000/greeting.txt").read_text() == "hello"
    changed = dataclasses.replace
    assert (
        reason(changed(TASK, config={"dedup": {"ngram": 7}}), tmp_path) == "configuration changed: dedup.ngram 5 -> 7"
    )
    assert reason(changed(TASK, code="code2"), tmp_path) == "the code of this stage or a library it uses changed"
    assert reason(changed(TASK, inputs={"shard": "bbbb"}), tmp_path) == "input changed: shard"
    assert reason(changed(TASK, inputs={"shard": "aaaa", "model": "cccc"}), tmp_path) == "input changed: model"


def test_a_damaged_output_is_noticed_and_named(tmp_path: Path):
    run(TASK, tmp_path)
    output = tmp_path / "stages/greet/000000/greeting.txt"
    output.write_text("hell")
    assert reason(TASK, tmp_path) == f"output {output} has 4 bytes instead of 5"
    output.write_text("hallo")
    assert "does not have the content" in str(reason(TASK, tmp_path))
    output.unlink()
    assert reason(TASK, tmp_path) == f"output {output} is missing"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"stage": "greet"}', b"\xff\xfe"])
def test_a_damaged_record_means_that_the_task_is_not_done(tmp_path: Path, content: bytes):
    run(TASK, tmp_path)
    TASK.record_path(tmp_path).write_bytes(content)
    assert reason(TASK, tmp_path) == "not done yet"


def test_the_record_names_hashes_sizes_counts_and_seconds(tmp_path: Path):
    run(TASK, tmp_path)
    record = json.loads(TASK.record_path(tmp_path).read_text())
    assert record["outputs"]["greeting.txt"]["bytes"] == 5
    assert len(record["outputs"]["greeting.txt"]["xxh3_128"]) == 32
    assert record["config_hash"] == hash_json(TASK.config)
    assert record["input_hashes"] == {"shard": "aaaa"}
    assert record["counts"] == {"documents_in": 3, "documents_out": 2, "rejected": {"short": 1}, "detail": {}}
    assert record["cpu_seconds"] >= 0
    assert record["wall_seconds"] >= 0


def test_a_task_that_loses_a_document_stops_the_job_and_leaves_no_record(tmp_path: Path):
    task = dataclasses.replace(TASK, work=lose_a_document)
    with pytest.raises(DataError, match=r"greet 000000 \(shard.jsonl\): 3 documents in, but 2 out \+ 0 rejected = 2"):
        run(task, tmp_path)
    assert read_record(task.record_path(tmp_path)) is None


def test_documents_from_nowhere_are_no_better_than_lost_ones():
    with pytest.raises(DataError, match="3 documents in, but 3 out"):
        check_conservation("map", Counts(3, 3, {"short": 1}))


def test_nothing_is_in_place_before_commit(tmp_path: Path):
    execute(TASK, tmp_path)
    assert not (tmp_path / "stages").exists()


def test_commit_removes_what_describes_the_replaced_outputs_and_files_of_the_earlier_result(tmp_path: Path):
    run(TASK, tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text("{}")
    folder = tmp_path / TASK.target

    def write_other(folder: Path, text: str, progress=None) -> Counts:
        (folder / "other.txt").write_text(text)
        return Counts(0, 0)

    task = dataclasses.replace(TASK, work=write_other)
    commit(task, execute(task, tmp_path), tmp_path, [manifest])
    assert [path.name for path in folder.iterdir()] == ["other.txt"]
    assert not manifest.exists()


def test_the_hash_of_a_configuration_does_not_depend_on_the_order_of_keys():
    assert hash_json({"a": 1, "b": [1, 2]}) == hash_json({"b": [1, 2], "a": 1})
    assert hash_json({"a": 1}) != hash_json({"a": 2})
