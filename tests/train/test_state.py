"""What survives a restart."""

import json

from megagpt.train.state import TrainState


def test_a_state_survives_json():
    state = TrainState(step=7, tokens=700, skipped_steps=2, engine={"adam_step": 5, "loss_scale": 1024.0})
    assert TrainState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_each_step_counts_its_tokens_and_whether_it_was_skipped():
    state = TrainState().after_step(100, skipped=False).after_step(100, skipped=True).after_step(50, skipped=False)
    assert (state.step, state.tokens, state.skipped_steps) == (3, 250, 1)
