"""Two commands on one run's folder: the second is told, and touches nothing."""

from __future__ import annotations

from megagpt.errors import RunBusy
from megagpt.lock import locked_folder
from tests.distributed.processes import start, train_command
from tests.tiny import run_words


def test_a_folder_in_which_another_process_trains_is_refused_on_all_ranks(tmp_path, tokens):
    run_dir = tmp_path / "run"
    with locked_folder(run_dir, RunBusy("free before the test")):
        group = start(train_command, 2, run_words(run_dir, tokens, "train.max_steps=4"), log=tmp_path / "log")
        assert group.wait() == [RunBusy.exit_code] * 2, group.output()
    assert "another process trains here" in group.output()
    assert [path.name for path in run_dir.iterdir()] == [".lock"]
    start(train_command, 2, run_words(run_dir, tokens, "train.max_steps=4"), log=tmp_path / "log").finish()
