"""A run never starts at step 0 in silence: the newest complete checkpoint is taken, and what is not is named."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from megagpt.checkpoint.choose import choose_step
from megagpt.checkpoint.manage import list_checkpoints
from megagpt.checkpoint.open import open_checkpoint
from megagpt.checkpoint.store import CheckpointStore
from megagpt.errors import CheckpointError, CheckpointUnreadable, SystemFailed
from tests.checkpoint.small_saves import check_whole, save


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    save(store, 1)
    save(store, 2)
    return store


@pytest.fixture
def empty(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return CheckpointStore(tmp_path / "run" / "checkpoints")


def chosen(store, rule="auto"):
    return choose_step(store.folder, store.survey(), rule)


def stray(name, content=""):
    return lambda folder: (folder / name).write_text(content)


def partial(folder):
    shutil.copytree(folder.parent / "aside", folder / "step_00000009")


def linked(to):
    return lambda folder: (folder / "step_00000009").symlink_to(to)


OTHERS = {
    "latest, empty": (stray("latest"), "latest", "is no checkpoint of this program"),
    "latest, garbage": (stray("latest", "\0\xff"), "latest", "is no checkpoint"),
    "latest, of a folder that is gone": (stray("latest", "global_step1000"), "latest", "is no checkpoint"),
    "latest, pointing outside": (stray("latest", "../../../etc"), "latest", "is no checkpoint"),
    "latest, of a newer step": (stray("latest", "step_00000009"), "latest", "is no checkpoint"),
    "latest, a link": (lambda folder: (folder / "latest").symlink_to("/etc"), "latest", "is no checkpoint"),
    "another program's": (lambda folder: (folder / "global_step9").mkdir(), "global_step9", "is no checkpoint"),
    "a file": (stray("step_00000009"), "step_00000009", "is not a folder"),
    "an empty folder": (lambda folder: (folder / "step_00000009").mkdir(), "step_00000009", "has no manifest.json"),
    "a partial copy": (partial, "step_00000009", "has no manifest.json, so it is not complete"),
    "a link outside": (linked("/etc"), "step_00000009", "is a link to /etc"),
    "a link to nothing": (linked("gone"), "step_00000009", "is a link to gone"),
    "a link to another step": (linked("step_00000001"), "step_00000009", "is a link to step_00000001"),
    "a link to itself": (linked("step_00000009"), "step_00000009", "is a link to step_00000009"),
    "a name of digits that are not ASCII": (
        lambda f: (f / "step_٠٠٠٠٠٠٠٩").mkdir(),
        "step_٠٠٠٠٠٠٠٩",
        "is no checkpoint",
    ),
}


@pytest.fixture(params=OTHERS)
def other(request, tmp_path):
    make, name, why = OTHERS[request.param]
    (tmp_path / "run" / "aside").mkdir(parents=True)
    (tmp_path / "run" / "aside" / "rank_00000.safetensors").write_bytes(b"1" * 100)
    return make, name, why


def test_the_newest_complete_checkpoint_is_chosen_and_the_rest_is_named(other, store):
    make, name, why = other
    make(store.folder)
    assert chosen(store) == chosen(store, "must") == 2
    assert store.survey().rejected[name].startswith(why)
    assert f"{name}: {why}" in list_checkpoints(store.folder.parent)
    with pytest.raises(CheckpointError, match=r"'never' but .* holds step 2"):
        chosen(store, "never")


def test_where_there_is_nothing_complete_the_run_does_not_start_at_step_0_over_it(other, empty):
    make, name, why = other
    make(empty.folder)
    with pytest.raises(
        CheckpointError, match=f"holds no complete checkpoint .*{name} {why}.*To start at step 0 remove"
    ):
        chosen(empty)
    with pytest.raises(CheckpointError, match=f"'must' but .*{name} {why}"):
        chosen(empty, "must")
    with pytest.raises(CheckpointError, match=f"holds no complete checkpoint; .*{name} {why}"):
        open_checkpoint(empty.folder.parent)
    assert chosen(empty, "never") is None, "who says never starts at step 0 knowingly"


def test_what_is_no_checkpoint_counts_for_no_retention(other, store):
    """Else a newer folder that is not complete would push out the only checkpoints that are."""
    make, name, _ = other
    make(store.folder)
    save(store, 3, keep_last=1)
    assert check_whole(store) == [3]
    assert os.path.lexists(store.folder / name), "it is not the program's to remove"


@pytest.mark.parametrize("there", [False, True])
def test_an_empty_folder_or_a_first_save_that_was_never_finished_starts_at_step_0(there, tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    if there:
        store.begin(5)
        assert store.survey().rejected == {"step_00000005.tmp": "was never finished"}
    assert chosen(store) is None
    with pytest.raises(CheckpointError, match="'must'"):
        chosen(store, "must")


def test_a_checkpoint_that_was_being_removed_is_no_fresh_start(empty):
    (empty.folder / "step_00000005.removed").mkdir()
    with pytest.raises(CheckpointError, match=r"step_00000005.removed was being removed"):
        chosen(empty)


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("gone"), lambda path: path.write_text("a file")])
def test_a_folder_that_is_none_is_refused(make, tmp_path):
    make(tmp_path / "checkpoints")
    with pytest.raises(
        CheckpointError, match=r"checkpoints: (is a link to gone, which is gone|cannot be read: Not a dir)"
    ):
        chosen(CheckpointStore(tmp_path / "checkpoints"))


@contextmanager
def nobody():
    """Root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def closed():
    """A store that everyone may look at, and take rights away from."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        store = CheckpointStore(Path(folder) / "checkpoints")
        save(store, 1)
        save(store, 2)
        yield store
        for path in (store.folder, *store.folder.iterdir()):
            path.chmod(0o755)


@pytest.mark.parametrize("rule", ["auto", "must", "never"])
def test_a_newest_step_that_may_not_be_read_is_refused_by_name(rule, closed):
    """It may be the newest checkpoint: what goes on before it would come to its step again, and cannot save there."""
    closed.step_dir(2).chmod(0o000)
    named = r"step_00000002: cannot be read: Permission denied, and it is newer .*to go on from step 1"
    with nobody():
        found = closed.survey()
        with pytest.raises(CheckpointUnreadable, match=named) as refused:
            chosen(closed, rule)
        with pytest.raises(CheckpointUnreadable, match=named):
            open_checkpoint(closed.folder.parent)
    assert refused.value.exit_code == SystemFailed.exit_code
    assert found.steps == [1]
    assert found.rejected == {"step_00000002": "cannot be read: Permission denied"}


def test_an_older_step_that_may_not_be_read_is_named_and_the_newest_is_taken(closed):
    closed.step_dir(1).chmod(0o000)
    with nobody():
        assert chosen(closed) == 2
        assert closed.survey().rejected == {"step_00000001": "cannot be read: Permission denied"}


def test_a_folder_that_may_not_be_read_is_refused(closed):
    closed.folder.chmod(0o000)
    with nobody(), pytest.raises(CheckpointError, match="checkpoints: cannot be read: Permission denied"):
        chosen(closed)


def test_a_manifest_that_may_not_be_read_is_refused_by_name(closed):
    (closed.step_dir(2) / "manifest.json").chmod(0o000)
    with (
        nobody(),
        pytest.raises(CheckpointError, match=r"step_00000002/manifest.json: cannot be read: Permission denied"),
    ):
        open_checkpoint(closed.step_dir(2))
