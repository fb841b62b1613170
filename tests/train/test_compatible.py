"""What a resumed run must keep."""

from __future__ import annotations

from pathlib import Path

import pytest

from megagpt.checkpoint.store import Manifest
from megagpt.errors import CheckpointError
from megagpt.train.compatible import check_resumable
from tests.tiny import run_config

STEP_DIR = Path("run/checkpoints/step_00000001")


def manifest(config, fingerprint="f"):
    state = {"step": 1, "engine": {"adam_step": 1}}
    return Manifest(1, {}, state, config, fingerprint, None, {})


def test_a_checkpoint_from_before_there_was_a_choice_of_optimizers_is_adamw_s(tmp_path):
    config = run_config(tmp_path, tmp_path / "t")
    saved = config.model_dump(mode="json")
    del saved["optim"]["name"], saved["optim"]["muon"]
    check_resumable(config, manifest(saved), "f", STEP_DIR)
    muon = run_config(tmp_path, tmp_path / "t", "optim.name=muon")
    with pytest.raises(CheckpointError, match=r"optim.name is 'adamw' in the checkpoint, 'muon' in the configuration"):
        check_resumable(muon, manifest(saved), "f", STEP_DIR)


def test_imported_weights_go_on_under_any_optimizer(tmp_path):
    saved = run_config(tmp_path, tmp_path / "t").model_dump(mode="json")
    check_resumable(run_config(tmp_path, tmp_path / "t", "optim.name=muon"), manifest(saved, None), "f", STEP_DIR)
