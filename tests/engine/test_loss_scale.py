"""fp16's loss scale over DeepSpeed's own scaler: what a checkpoint brings, and what it does not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from megagpt.engine.loss_scale import LossScale


@pytest.fixture
def optimizer(monkeypatch):
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)  # the scaler's log asks for it
    scaler = DynamicLossScaler(2.0**10, scale_window=2, min_scale=1.0, delayed_shift=2, consecutive_hysteresis=False)
    return SimpleNamespace(loss_scaler=scaler)


def steps(optimizer, overflows):
    for overflow in overflows:
        optimizer.loss_scaler.update_scale(overflow)


def test_a_scale_goes_on_as_it_was_saved(optimizer):
    scale = LossScale(optimizer)
    steps(optimizer, [False, True, False, False, False])
    saved, value = scale.state(), scale.value
    steps(optimizer, [True, True, True])
    assert scale.value != value
    scale.restore(saved)
    assert (scale.state(), scale.value) == (saved, value)


def test_after_a_checkpoint_of_another_precision_it_begins_anew(optimizer):
    scale = LossScale(optimizer)
    begun = scale.state()
    steps(optimizer, [False, False, False, True])
    assert scale.state() != begun
    scale.restore({"adam_step": 5})
    assert scale.state() == begun
