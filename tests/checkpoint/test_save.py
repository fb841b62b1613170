"""A save is killed, or the disk fails, at every single call: what can be seen afterwards is whole."""

from __future__ import annotations

import shutil

import pytest

from megagpt.checkpoint.save import verify_together
from megagpt.checkpoint.store import CheckpointStore
from megagpt.errors import CheckpointError
from tests.checkpoint.faults import (
    Killed,
    failing_at,
    io_error,
    killed,
    no_space,
    over_quota,
    too_many_files,
    writing_at_most,
)
from tests.checkpoint.small_saves import ALONE, check_whole, save, save_by

KINDS = ("sync", "async")


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "checkpoints"
    store = CheckpointStore(folder)
    save(store, 1)
    save(store, 2)
    return folder


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text("{}")
    return path


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def n_calls(kind, two_checkpoints, tokenizer_file, tmp_path_factory):
    """How many calls a whole save of step 3 makes, with the removal of step 1."""
    folder = tmp_path_factory.mktemp("count") / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    with failing_at(10**9, killed) as system:
        save_by(kind, CheckpointStore(folder), 3, tokenizer_file)
    assert check_whole(CheckpointStore(folder)) == [2, 3]
    return system.calls


def attempts(n_calls, two_checkpoints, tmp_path):
    for k in range(1, n_calls + 1):
        folder = tmp_path / f"{k}" / "checkpoints"
        shutil.copytree(two_checkpoints, folder)
        yield k, CheckpointStore(folder)


def test_the_count_covers_every_kind_of_call(n_calls):
    """mkdir; open, header, tensors, tokenizer, manifest, fsyncs ...; renames; removal of the oldest."""
    assert n_calls >= 20


@pytest.mark.parametrize("leftover", [False, True], ids=["clean", "after another kill"])
def test_a_save_killed_before_any_call_leaves_whole_checkpoints_and_the_next_save_works(
    kind, leftover, n_calls, two_checkpoints, tokenizer_file, tmp_path
):
    for k, store in attempts(n_calls, two_checkpoints, tmp_path):
        if leftover:
            store.begin(3)
            (store.staging_dir(3) / "rank_00007.safetensors").write_bytes(b"of an older save")
        with pytest.raises(Killed), failing_at(k, killed):
            save_by(kind, store, 3, tokenizer_file)
        seen = check_whole(store)
        assert 2 in seen, f"killed before call {k}"
        following = 4 if 3 in seen else 3
        save(store, following, tokenizer_file)
        assert check_whole(store) == ([2, 3] if following == 3 else [3, 4])
        names = {path.name for path in store.folder.iterdir()}
        assert names == {f"step_{step:08d}" for step in store.steps()}, f"killed before call {k}"
        assert not (store.step_dir(following) / "rank_00007.safetensors").exists()


@pytest.mark.parametrize("once", [True, False], ids=["once", "from then on"])
@pytest.mark.parametrize("failure", [no_space, io_error, over_quota, too_many_files])
def test_a_failing_disk_is_told_with_its_cause_ends_no_run_and_harms_no_older_checkpoint(
    kind, failure, once, n_calls, two_checkpoints, tokenizer_file, tmp_path
):
    for k, store in attempts(n_calls, two_checkpoints, tmp_path):
        with failing_at(k, failure, once=once):
            told = save_by(kind, store, 3, tokenizer_file)
        (event,) = told.events
        assert event["event"] in ("save_failed", "not_removed")
        assert failure().strerror in event["cause"]
        assert failure().strerror in told.lines[0]
        seen = check_whole(store)
        assert 2 in seen, f"failed at call {k}"
        if once and event["event"] == "save_failed":
            assert not store.staging_dir(3).exists(), "its room is free again"
        following = 4 if 3 in seen else 3
        save(store, following, tokenizer_file)
        assert following in check_whole(store)
        assert {path.name for path in store.folder.iterdir()} == {f"step_{step:08d}" for step in store.steps()}


@pytest.mark.parametrize("n_bytes", [1, 7, 1000])
def test_a_system_that_writes_less_than_it_is_asked_to_writes_it_all_in_the_end(
    n_bytes, kind, tokenizer_file, tmp_path
):
    whole, short = CheckpointStore(tmp_path / "whole"), CheckpointStore(tmp_path / "short")
    save_by(kind, whole, 3, tokenizer_file)
    with writing_at_most(n_bytes):
        assert save_by(kind, short, 3, tokenizer_file).events == []
    assert check_whole(short) == [3]
    for path in whole.step_dir(3).iterdir():
        assert (short.step_dir(3) / path.name).read_bytes() == path.read_bytes()


def test_a_system_that_writes_nothing_does_not_hang_a_save(kind, tmp_path):
    with writing_at_most(0):
        (event,) = save_by(kind, CheckpointStore(tmp_path), 3).events
    assert "nothing could be written" in event["cause"]


def test_a_published_step_is_never_overwritten(two_checkpoints, tmp_path):
    store = CheckpointStore(shutil.copytree(two_checkpoints, tmp_path / "copy"))
    manifest = store.step_dir(2) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"torch": "2"', b'"torch": "3"'))
    before = manifest.read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        save(store, 2)
    assert manifest.read_bytes() == before


def test_the_same_content_again_is_no_error(two_checkpoints):
    """A disk that failed after the rename: the save is tried again."""
    store = CheckpointStore(two_checkpoints)
    save(store, 2)
    assert check_whole(store) == [1, 2]
    assert not store.staging_dir(2).exists()


def test_verifying_together_names_the_damaged_file_and_what_to_do(two_checkpoints, tmp_path):
    store = CheckpointStore(shutil.copytree(two_checkpoints, tmp_path / "copy"))
    (store.step_dir(2) / "rank_00000.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"rank_00000.safetensors: damaged: 0 bytes(.|\n)*Remove .*step_00000002"):
        verify_together(store.step_dir(2), ALONE)
