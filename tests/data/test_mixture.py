"""Mixtures: weights hold over any stretch, change when they should, and every source ends as it is told."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.fakes import LengthTask, MemorySource, loader_of, memory_data, merged, steps_of
from trainer.data.loader import StepBatch
from trainer.data.stream import StreamData
from trainer.errors import ConfigError


def shares(steps: list[StepBatch], unit: str = "samples") -> dict[str, float]:
    """Observed share of each source."""
    counts: Counter[str] = Counter()
    for step in steps:
        for id in step.ids:
            counts[id.split("/")[0]] += 1 if unit == "samples" else length_of(id)
    return {name: count / counts.total() for name, count in counts.items()}


def length_of(id: str) -> int:
    shard, record = id.rsplit("/s", 1)[1].split(":")
    return 1 + (7 * int(shard) + 13 * int(record)) % (53 if id.startswith("b") else 23)


@pytest.mark.parametrize("unit", ["samples", "tokens"])
@pytest.mark.parametrize("shards", [60, 3])
def test_observed_weights_are_within_a_hundredth_over_100_000_samples(unit: str, shards: int) -> None:
    sources = {
        "a": MemorySource([2000] * shards),
        "b": MemorySource([500] * shards, longest=53),
        "c": MemorySource([70] * shards),
    }
    weights = {"a": 0.7, "b": 0.29, "c": 0.01}
    data = memory_data(sources, sources={name: {"weight": w} for name, w in weights.items()}, mix_by=unit)
    (steps,) = steps_of(data, 209, global_size=480)
    observed = shares(steps, unit)
    assert sum(step.num_samples for step in steps) > 100_000
    for name, weight in weights.items():
        assert observed[name] == pytest.approx(weight, abs=0.01)


@settings(max_examples=30)
@given(weights=st.lists(st.floats(0.05, 1.0), min_size=2, max_size=4), seed=st.integers(0, 9))
def test_weights_hold_over_every_stretch_of_a_few_steps(weights: list[float], seed: int) -> None:
    sources = {str(number): MemorySource([50] * 24) for number in range(len(weights))}
    given = {str(number): {"weight": weight} for number, weight in enumerate(weights)}
    data = memory_data(sources, sources=given, lanes=24, block=8)
    (steps,) = steps_of(data, 24, global_size=96, seed=seed)
    for begin in (0, 8, 16):
        observed = shares(steps[begin : begin + 8])
        for number, weight in enumerate(weights):
            assert observed.get(str(number), 0.0) == pytest.approx(weight / sum(weights), abs=0.07)


def test_weights_change_at_their_step() -> None:
    sources = {"a": MemorySource([3000] * 48), "b": MemorySource([3000] * 48)}
    given = {"a": {"weight": [[0, 1.0], [10, 0.25], [30, 0.0]]}, "b": {"weight": [[0, 0.0], [10, 0.75]]}}
    data = memory_data(sources, sources=given, block=40)
    (steps,) = steps_of(data, 40, global_size=480)
    assert shares(steps[:10]) == {"a": 1.0}
    assert shares(steps[10:30])["b"] == pytest.approx(0.75, abs=0.01)
    assert shares(steps[30:]) == {"b": 1.0}


def run_to_the_end(at_end: str, world_size: int) -> list[list[StepBatch]]:
    sources = {"small": MemorySource([10] * 24), "large": MemorySource([40] * 24)}
    given = {"small": {"at_end": at_end}, "large": {"at_end": "drop"}}
    return steps_of(memory_data(sources, sources=given, lanes=24, block=4), None, world_size)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_source_that_is_dropped_is_seen_once_and_the_others_go_on(world_size: int) -> None:
    seen = Counter(id for steps in run_to_the_end("drop", world_size) for step in steps for id in step.ids)
    assert set(seen.values()) == {1} and len(seen) == 24 * 50


def test_what_is_left_goes_on_even_without_a_weight() -> None:
    sources = {"a": MemorySource([4] * 24), "b": MemorySource([6] * 24)}
    given = {"a": {"at_end": "drop"}, "b": {"weight": 0, "at_end": "drop"}}
    (steps,) = steps_of(memory_data(sources, sources=given, lanes=24, block=4), None)
    seen = Counter(id for step in steps for id in step.ids)
    assert set(seen.values()) == {1} and len(seen) == 24 * 10


def test_a_source_that_stops_ends_the_run() -> None:
    (steps,) = run_to_the_end("stop", 1)
    seen = Counter(id.split("/")[0] for step in steps for id in step.ids)
    assert seen["small"] == 240 and seen["large"] == pytest.approx(240, abs=24)


def test_a_mixture_of_one_ends_as_it_is_told() -> None:
    data = memory_data({"a": MemorySource([7] * 24)}, sources={"a": {"at_end": "stop"}}, lanes=24, block=4)
    (steps,) = steps_of(data, None)
    seen = Counter(id for step in steps for id in step.ids)
    assert set(seen.values()) == {1} and len(seen) == 24 * 7


def test_a_source_that_repeats_begins_again() -> None:
    sources = {"small": MemorySource([2] * 24), "large": MemorySource([40] * 24)}
    given = {"large": {"at_end": "stop"}}
    (steps,) = steps_of(memory_data(sources, sources=given, lanes=24, block=4), None)
    seen = Counter(id for step in steps for id in step.ids)
    assert all(count in (19, 20, 21) for id, count in seen.items() if id.startswith("small/"))
    assert all(count == 1 for id, count in seen.items() if id.startswith("large/")) and len(seen) == 24 * 42


def test_lanes_do_not_all_take_from_the_same_source_at_once() -> None:
    sources = {"a": MemorySource([100] * 48), "b": MemorySource([100] * 48)}
    data = memory_data(sources, batching="padded", shuffle=False)
    (first, *_) = merged(steps_of(data, 1, global_size=48))
    assert 10 < sum(id.startswith("a/") for id in first) < 38


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": {"a": {"path": "x", "wieght": 1}}}, "data.sources.a.wieght is no option of a source; did you"),
        ({"sources": {"a": {"weight": 1}}}, "data.sources.a=.* must be a mapping with path"),
        ({"sources": {"a": {"path": 5}}}, "data.sources.a.path=5 is not a text"),
        ({"sources": {"a": {"path": "x", "task": "y"}}}, "data.sources.a.task='y' is not a mapping of options"),
        ({"sources": {"a": {"path": "x", "weight": -1}}}, "data.sources.a.weight=-1 must be a number of 0 or more"),
        ({"sources": {"a": {"path": "x", "weight": [[5, 1.0]]}}}, "begins at step 0"),
        ({"sources": {"a": {"path": "x", "weight": [[0, 1], [9, 0]]}}}, "all weights are 0 from step 9 on"),
        ({"sources": {"a": {"path": "x", "at_end": "loop"}}}, "a.at_end=loop is not known; use repeat, drop, stop"),
        ({"path": "x", "sources": {"a": {"path": "x"}}}, "data.path=x, .* and data.sources=.*: give one of the three"),
        ({}, "give one of the two"),
        ({"path": "x", "workers": -1}, "data.workers=-1 must be at least 0"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StreamData(**options)


def test_epochs_of_a_mixture_are_refused() -> None:
    data = memory_data({"a": MemorySource([9] * 48), "b": MemorySource([9] * 48)})
    with pytest.raises(ConfigError, match=r"stop\.epochs=2 has no meaning for a mixture"):
        loader_of(data, LengthTask(), epochs=2)
