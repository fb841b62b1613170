"""Damage of any kind is refused, naming the file; retention keeps what it should."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest

from megagpt.checkpoint.manage import list_checkpoints, prune_run, verify_all
from megagpt.checkpoint.store import CheckpointStore, read_manifest, verify_checkpoint
from megagpt.errors import CheckpointError
from megagpt.lock import locked_folder
from tests.checkpoint.calls import place_of, standing_in
from tests.checkpoint.hostile import encoded
from tests.checkpoint.small_saves import check_whole, save

TENSORS = "rank_00000.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    tokenizer_file = folder / "tokenizer.json"
    tokenizer_file.write_text('{"a": 1}')
    store = CheckpointStore(folder / "checkpoints")
    save(store, 1)
    save(store, 2, tokenizer_file)
    return folder / "checkpoints"


@pytest.fixture
def store(original, tmp_path):
    return CheckpointStore(shutil.copytree(original, tmp_path / "checkpoints"))


@pytest.mark.parametrize("name", [TENSORS, "tokenizer.json"])
def test_any_flipped_byte_of_a_file_is_refused_naming_the_file(name, store):
    path = store.step_dir(2) / name
    content = path.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=f"{name}: damaged: {len(content)} bytes"):
            verify_checkpoint(store.step_dir(2))


def test_any_flipped_byte_of_the_manifest_is_refused(store):
    path = store.step_dir(2) / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"step_00000002/manifest.json: (damaged|format)"):
            read_manifest(store.step_dir(2))


def test_a_file_cut_at_any_length_is_refused(store):
    path = store.step_dir(2) / TENSORS
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=f"{TENSORS}: damaged: {length} bytes"):
            verify_checkpoint(store.step_dir(2))


def test_a_missing_file_is_refused(store):
    (store.step_dir(2) / TENSORS).unlink()
    with pytest.raises(CheckpointError, match=f"{TENSORS}: listed in manifest.json but cannot be read: No such file"):
        verify_checkpoint(store.step_dir(2))


def test_a_file_of_another_step_is_refused(store):
    shutil.copy(store.step_dir(1) / TENSORS, store.step_dir(2) / TENSORS)
    with pytest.raises(CheckpointError, match=f"{TENSORS}: damaged"):
        verify_checkpoint(store.step_dir(2))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b'{"format": 1}', b'"text"'])
def test_garbage_for_a_manifest_is_refused_naming_it(content, store):
    (store.step_dir(2) / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step_00000002/manifest.json: damaged"):
        read_manifest(store.step_dir(2))


def rewrite(path, **changes):
    """A manifest that is changed on purpose, with the right checksum."""
    path.write_bytes(encoded(json.loads(path.read_bytes()) | changes))


def test_a_manifest_of_another_format_says_which(store):
    rewrite(store.step_dir(2) / "manifest.json", format=7)
    with pytest.raises(CheckpointError, match="format 7; this version reads format 1"):
        read_manifest(store.step_dir(2))


@pytest.mark.parametrize("name", ["../step_00000001/rank_00000.safetensors", "/etc/hostname", "a/b", ".."])
def test_a_manifest_cannot_name_files_outside_its_folder(name, store):
    path = store.step_dir(2) / "manifest.json"
    rewrite(path, files={name: {"bytes": 1, "xxh3_128": "0"}})
    with pytest.raises(CheckpointError, match=r"leaves the checkpoint's folder|cannot be read"):
        verify_checkpoint(store.step_dir(2))


def test_a_folder_without_manifest_is_not_a_checkpoint(store):
    (store.step_dir(2) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no manifest.json, so this is not a complete checkpoint"):
        verify_checkpoint(store.step_dir(2))


def test_only_published_folders_are_steps(store):
    for name in ("step_00000003.tmp", "step_00000004.removed", "step_5", "other", "step_00000006x"):
        (store.folder / name).mkdir()
    (store.folder / "step_00000007").write_text("a file")
    assert store.steps() == [1, 2]
    assert len(store.survey().rejected) == 6
    assert CheckpointStore(store.folder / "absent").steps() == []


def test_steps_above_eight_digits_are_found_in_order(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (99_999_999, 100_000_000):
        save(store, step)
    assert store.steps() == [99_999_999, 100_000_000]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(1, 0, [7]), (3, 0, [5, 6, 7]), (1, 3, [3, 6, 7]), (2, 2, [2, 4, 6, 7]), (9, 0, [1, 2, 3, 4, 5, 6, 7])],
)
def test_retention_keeps_the_newest_and_the_multiples(keep_last, keep_every, left, tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in range(1, 8):
        save(store, step, keep_last=9)
    removed = store.prune(keep_last, keep_every).steps
    assert check_whole(store) == left
    assert sorted(removed + left) == [1, 2, 3, 4, 5, 6, 7]


def test_the_hash_names_the_weights_not_the_step(tmp_path):
    store, other = CheckpointStore(tmp_path / "a"), CheckpointStore(tmp_path / "b")
    for one in (store, other):
        save(one, 1)
    save(store, 2)
    assert read_manifest(store.step_dir(1)).hash == read_manifest(other.step_dir(1)).hash
    assert read_manifest(store.step_dir(1)).hash != read_manifest(store.step_dir(2)).hash


def test_the_list_shows_each_checkpoint_and_verify_names_every_damaged_one(store):
    lines = list_checkpoints(store.folder.parent).splitlines()
    assert [line.split()[1] for line in lines] == ["1", "2"]
    assert all(
        line.endswith(read_manifest(store.step_dir(step)).hash) for line, step in zip(lines, (1, 2), strict=True)
    )
    assert "2 checkpoints" in verify_all(store.folder.parent)
    for step in (1, 2):
        (store.step_dir(step) / TENSORS).unlink()
    with pytest.raises(CheckpointError, match=r"step_00000001(.|\n)*step_00000002"):
        verify_all(store.folder.parent)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder; name the folder of a run"):
        list_checkpoints(tmp_path)


def run_of(store, *steps):
    for step in steps:
        save(store, step, keep_last=9)
    return store.folder.parent


def test_pruning_removes_what_the_rule_does_not_keep_and_says_so(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    run_dir = run_of(store, *range(1, 8))
    store.staging_dir(9).mkdir()
    dry = prune_run(run_dir, keep_last=2, keep_every=3, dry_run=True)
    assert check_whole(store) == [1, 2, 3, 4, 5, 6, 7]
    assert store.staging_dir(9).exists()
    told = prune_run(run_dir, keep_last=2, keep_every=3, dry_run=False)
    assert check_whole(store) == [3, 6, 7]
    assert {path.name for path in store.folder.iterdir()} == {f"step_{step:08d}" for step in (3, 6, 7)}
    assert dry.replace("would remove", "removed") == told
    lines = told.splitlines()
    assert [line.split()[2] for line in lines[:4]] == ["1", "2", "4", "5"]
    assert "MiB" in lines[0]
    assert lines[4] == "removed step_00000009.tmp"
    assert lines[5].endswith("keeps 3, 6, 7")


@pytest.mark.parametrize("dry_run", [True, False])
def test_nothing_is_pruned_where_the_newest_is_damaged(dry_run, tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    run_dir = run_of(store, 1, 2, 3)
    (store.step_dir(3) / TENSORS).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"nothing was removed.*step_00000003/rank_00000.safetensors: damaged"):
        prune_run(run_dir, keep_last=1, keep_every=0, dry_run=dry_run)
    assert store.steps() == [1, 2, 3]


def test_nothing_is_pruned_under_a_run_that_trains(tmp_path):
    run_dir = run_of(CheckpointStore(tmp_path / "checkpoints"), 1, 2, 3)
    with (
        locked_folder(run_dir, CheckpointError("busy")),
        pytest.raises(CheckpointError, match="a process trains here"),
    ):
        prune_run(run_dir, keep_last=1, keep_every=0, dry_run=False)
    assert check_whole(CheckpointStore(tmp_path / "checkpoints")) == [1, 2, 3]


def test_what_was_set_aside_is_listed_and_removed_where_that_is_asked_for(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    run_dir = run_of(store, 1, 2, 3, 4)
    store.set_aside(3)
    (store.folder / "step_00000002.damaged1").mkdir()  # as an older version named it
    asides = {"step_00000003.damaged", "step_00000002.damaged1"}
    listed = list_checkpoints(run_dir)
    assert all(f"{name}: was set aside; `megagpt checkpoint prune --damaged` removes it" in listed for name in asides)
    told = prune_run(run_dir, keep_last=2, keep_every=0, dry_run=False)
    assert all((store.folder / name).is_dir() for name in asides)
    assert "removed step_00000003" not in told
    assert all(f"left {name}" in told for name in asides)
    assert "removed step        1" in told
    dry = prune_run(run_dir, keep_last=2, keep_every=0, dry_run=True, damaged=True)
    assert all((store.folder / name).is_dir() for name in asides)
    told = prune_run(run_dir, keep_last=2, keep_every=0, dry_run=False, damaged=True)
    assert dry.replace("would remove", "removed") == told
    assert all(f"removed {name}" in told for name in asides)
    assert {path.name for path in store.folder.iterdir()} == {"step_00000002", "step_00000004"}


def test_pruning_says_what_it_could_not_remove(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    run_dir = run_of(store, 1, 2, 3)
    store.set_aside(2)
    held = store.folder / "step_00000002.damaged"

    def handle(name, call, args, kwargs):
        if name == "rmdir" and place_of(args, kwargs) == held:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(held))
        return call()

    with (
        standing_in(handle),
        pytest.raises(
            CheckpointError, match=r"removed step        1(.|\n)*not removed: .*step_00000002.damaged: Device"
        ),
    ):
        prune_run(run_dir, keep_last=1, keep_every=0, dry_run=False, damaged=True)
    assert held.is_dir()
