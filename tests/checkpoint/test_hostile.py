"""Checkpoints made to do harm: none runs anything, all are refused with a reason, in bounded time and memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.hostile import CANARY, HOSTILE
from tests.checkpoint.test_open import save_model
from tests.tiny import run_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def opened(tmp_path_factory, tokens):
    """Name -> what came of opening it; the memory that all of them took, in KiB; where it was done."""
    folder = tmp_path_factory.mktemp("hostile")
    good, runs = folder / "good", folder / "runs"
    save_model(good, run_config(good, tokens), 2)
    for number, make in enumerate(HOSTILE.values()):
        shutil.copytree(good, runs / f"{number:03d}")
        make(runs / f"{number:03d}" / "checkpoints" / "step_00000002")
    command = [sys.executable, str(ROOT / "tests" / "checkpoint" / "open_hostile.py")]
    done = subprocess.run(
        [*command, str(runs)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    return {name: result["found"][f"{number:03d}"] for number, name in enumerate(HOSTILE)}, result["more_kib"], folder


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_with_a_reason_and_nothing_runs(name, opened):
    found, _, folder = opened
    assert found[name]["kind"] == "refused", found[name]["told"]
    assert 20 < len(found[name]["told"]) < 2000
    assert str(folder / "runs") in found[name]["told"], "the message says which file"
    assert found[name]["events"] == []
    assert found[name]["seconds"] < 5


def test_there_are_enough_of_them_and_none_has_left_a_trace(opened):
    _, more_kib, folder = opened
    assert len(HOSTILE) >= 100
    assert not list(folder.rglob(CANARY))
    assert not list(folder.rglob("escaped"))
    assert more_kib < 400 * 1024, "memory is bounded: a header may have 100 MB, a manifest 64"


def test_a_payload_that_is_loaded_would_be_seen(tmp_path, monkeypatch):
    import pickle

    from tests.checkpoint.hostile import PICKLE

    monkeypatch.chdir(tmp_path)
    pickle.loads(PICKLE)
    assert (tmp_path / CANARY).exists()
