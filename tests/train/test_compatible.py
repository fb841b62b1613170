"""What a resumed run must keep."""

from __future__ import annotations

from pathlib import Path

import pytest

from megagpt.checkpoint.store import Manifest
from megagpt.config.load import section_types
from megagpt.config.schema import TrainingRun
from megagpt.errors import CheckpointError
from megagpt.train.compatible import UNCHANGEABLE, check_resumable
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


def test_whether_documents_see_each_other_is_not_changed_on_the_way(tmp_path):
    isolated = run_config(tmp_path, tmp_path / "t", "data.isolate_documents=true")
    mixed = run_config(tmp_path, tmp_path / "t")
    with pytest.raises(CheckpointError, match=r"data.isolate_documents is False in the checkpoint, True in the config"):
        check_resumable(isolated, manifest(mixed.model_dump(mode="json")), "f", STEP_DIR)
    with pytest.raises(CheckpointError, match=r"data.isolate_documents is True in the checkpoint, False in the config"):
        check_resumable(mixed, manifest(isolated.model_dump(mode="json")), "f", STEP_DIR)
    check_resumable(isolated, manifest(isolated.model_dump(mode="json")), "f", STEP_DIR)
    check_resumable(isolated, manifest(mixed.model_dump(mode="json"), None), "f", STEP_DIR)  # imported weights
    older = mixed.model_dump(mode="json")
    del older["data"]["isolate_documents"]
    check_resumable(mixed, manifest(older), "f", STEP_DIR)
    with pytest.raises(CheckpointError, match=r"data.isolate_documents is False in the checkpoint"):
        check_resumable(isolated, manifest(older), "f", STEP_DIR)


CHANGEABLE = {
    # Where it lies, and how far it goes.
    "run": "dir",
    # train: compared by its tokens, weights and length of samples; tokenizer: with the one that made the tokens.
    "data": "train val tokenizer",
    # What the optimizer does from here on; what it remembers stays meaningful.
    "optim": "lr schedule warmup_steps decay_frac min_lr_frac betas eps weight_decay grad_clip",
    "optim.muon": "lr scale momentum nesterov ns_steps",
    # How the same step is computed. skip_batches: what has been read cannot be skipped (train.skips).
    "train": "max_steps micro_batch_size dtype recompute attention compile skip_batches offload_activations",
    # Any layout goes on from any.
    "parallel": "tensor pipeline pipeline_schedule pipeline_split sequence tensor_sequence zero_stage "
    "offload_optimizer offload_weights nvme_dir overlap_communication reduce_bucket_elements "
    "gather_bucket_elements prefetch_elements "
    "keep_gathered_below_elements max_live_elements update_elements shard_within_node extra",
    # What is kept, measured, watched and shown beside training.
    "checkpoint": "save_every resume fall_back keep_last keep_every asynchronous retry_after max_failed_saves "
    "verify_before_prune make_room",
    "eval": "every sequences tasks tasks_every tasks_limit tasks_batch_size data",
    "watch": "startup_seconds step_seconds save_seconds eval_seconds on_nonfinite on_spike spike_sigmas spike_window "
    "max_skips replicas_every slow_every silent_seconds",
    "log": "progress tensorboard wandb_project peak_tflops",
}
"""Keys that somebody has thought about and found safe to change at a resume. A new key belongs here, with a reason, or
in UNCHANGEABLE."""


def leaves(section, at=""):
    for name, field in section.model_fields.items():
        kinds = section_types(field.annotation)
        if kinds and f"{at}{name}" != "data.train":
            for kind in kinds:
                yield from leaves(kind, f"{at}{name}.")
        else:
            yield f"{at}{name}"


def test_every_key_is_deliberately_changeable_or_not():
    changeable = {f"{section}.{name}" for section, names in CHANGEABLE.items() for name in names.split()}
    kept = {key for key in leaves(TrainingRun) if any(f"{key}.".startswith(f"{other}.") for other in UNCHANGEABLE)}
    assert kept & changeable == set()
    assert kept | changeable == set(leaves(TrainingRun))
    assert len(changeable) > 60
