"""What survives a restart."""

import json
from dataclasses import replace

from megagpt.train.state import TrainState


def test_a_state_survives_json():
    state = TrainState(step=7, tokens=700, skipped_steps=2, engine={"adam_step": 5, "loss_scale": 1024.0})
    state = replace(state, refused_in_a_row=1, skipped_batches=((3, 5), (9, 11)), recent=((3.1, 0.1), (1 / 3, 0.7)))
    assert TrainState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_each_step_counts_its_tokens_and_whether_it_was_skipped():
    state = TrainState().after_step(100, skipped=False).after_step(100, skipped=True).after_step(50, skipped=False)
    assert (state.step, state.tokens, state.skipped_steps) == (3, 250, 1)


def test_a_state_of_an_older_version_has_skipped_nothing():
    old = {"step": 7, "tokens": 700, "skipped_steps": 2, "engine": {"adam_step": 5}}
    assert TrainState.from_dict(old) == TrainState(7, 700, 2, engine={"adam_step": 5})
