"""TrainState: totals add up, the best evaluation is remembered, JSON brings it back."""

import json

from trainer.state import TrainState


def test_totals_add_up_and_survive_json():
    state = TrainState().advance(100, 8, 0.5, 1.5).advance(50, 8, 1.0, 0.5)
    assert (state.step, state.tokens, state.samples, state.epoch, state.seconds) == (2, 150, 16, 1.0, 2.0)
    assert TrainState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_best_evaluation_by_direction():
    state = TrainState(step=10).evaluated(2.0, "min")
    assert (state.best, state.best_step, state.stale_evaluations) == (2.0, 10, 0)
    worse = state.advance(1, 1, 0, 0).evaluated(3.0, "min")
    assert (worse.best, worse.best_step, worse.stale_evaluations) == (2.0, 10, 1)
    assert worse.evaluated(1.0, "min").stale_evaluations == 0
    assert TrainState(step=1, best=0.5, best_step=0).evaluated(0.6, "max").best == 0.6


def test_unknown_keys_of_another_version_are_left_aside():
    assert TrainState.from_dict({"step": 3, "from_the_future": 1}) == TrainState(step=3)
