"""What the meter makes of measurements: rates, shares, and peaks of memory that are told when they grow."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.metrics import StepInfo
from trainer.metrics.meter import Meter
from trainer.state import TrainState


def report(meter: Meter, memory: list[int], **more: Any) -> StepInfo:
    facts = {
        "loss": 1.0,
        "grad_norm": 1.0,
        "lr": 0.1,
        "target_tokens": 50,
        "positions": 80,
        "padding": 20,
        "flops": 4e12,
    }
    rest: dict[str, Any] = {"skipped_steps": 0, "data": {}, "norms": {}, "drawn": {}}
    return meter.report(TrainState(step=2), memory=memory, **{**facts, **rest, **more})


def test_rates_are_of_the_interval_without_pauses() -> None:
    now = [0.0]
    meter = Meter(lambda: now[0], peak_flops_per_second=1e12)
    for _ in range(2):
        meter.step_done(tokens=50, positions=40, padding=10, wait_seconds=0.5, flops=1e12, drawn={"a": 3})
    assert meter.drawn == {"a": 6}
    now[0] = 12.0
    meter.pause(2.0)
    info = report(meter, [5, 7], drawn={"a": 6.0, "b": 2.0})
    assert (info.step_seconds, info.tokens_per_second, info.loader_wait_seconds) == (5.0, 10.0, 0.5)
    assert info.mfu == pytest.approx(4e12 / 10.0 / 2e12) and info.padding_fraction == 0.25
    assert info.mixture == {"a": 0.75, "b": 0.25} and info.memory_bytes == 7
    assert meter.drawn == {} and (meter.positions, meter.padding, meter.flops) == (0, 0, 0.0)


def test_memory_by_rank_is_told_when_a_peak_has_grown() -> None:
    meter = Meter(lambda: 0.0, None)
    told = [report(meter, memory).memory_by_rank for memory in ([100, 200], [100, 201], [100, 203], [102, 203])]
    assert told == [{"0": 100, "1": 200}, {}, {"0": 100, "1": 203}, {"0": 102, "1": 203}]


def test_of_very_many_ranks_a_choice_is_told_and_the_largest() -> None:
    memory = [100] * 1000
    memory[17] = 300
    told = report(Meter(lambda: 0.0, None), memory).memory_by_rank
    assert len(told) <= 65 and told["17"] == 300 and told["0"] == 100 and list(told) == sorted(told, key=int)


def test_a_step_without_a_mixture_has_no_shares() -> None:
    assert report(Meter(lambda: 0.0, None), [1], drawn={"a": 0.0}).mixture == {"a": 0.0}
    assert "mixture" not in report(Meter(lambda: 0.0, None), [1]).row()
