"""The stream is a function of (data, seed, epoch): not of ranks, micro-batches, kills or resumes."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.fakes import RANKS, LengthTask, MemorySource, loader_of, memory_data, merged, saved, steps_of
from trainer.data.loader import StepBatch
from trainer.data.order import Order
from trainer.data.stream import StreamData
from trainer.errors import ConfigError, DataError

GOLDEN_SHARDS = [3, 2, 5, 0, 1, 4]
GOLDEN_BLOCK = [9, 1, 5, 3, 7, 0, 8, 4, 6, 2, 10, 11]

sizes_of_shards = st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(
    lambda sizes: sum(sizes) >= 1 and sum(map(bool, sizes)) * 2 >= len(sizes)
)
streams = st.fixed_dictionaries(
    {
        "sizes": sizes_of_shards,
        "second": st.none() | sizes_of_shards,
        "weight": st.sampled_from([0.2, 1.0, [[0, 0.5], [3, 2.0], [5, 0.0]]]),
        "mix_by": st.sampled_from(["samples", "tokens"]),
        "block": st.integers(1, 20),
        "batching": st.sampled_from(["bucketed", "packed", "padded"]),
        "max_length": st.sampled_from([5, 23]),
        "seed": st.integers(0, 5),
        "bad": st.sets(st.tuples(st.integers(0, 60), st.integers(0, 5)), max_size=5),
    }
)


def open_stream(stream: dict[str, Any]) -> tuple[StreamData, dict[str, MemorySource]]:
    """The data of a drawn stream: one source, or a mixture of two."""
    sizes = list(stream["sizes"])
    sizes[0] += 6  # at least one good record, whatever is bad
    sources = {"": MemorySource(sizes, frozenset(stream["bad"]))}
    options = {"lanes": 24, "block": stream["block"], "batching": stream["batching"], "max_bad_fraction": 1.0}
    if stream["second"] is None:
        return memory_data(sources[""], **options), sources
    sources = {"a": sources[""], "b": MemorySource(stream["second"])}
    given = {"a": {"weight": 1.0}, "b": {"weight": stream["weight"]}}
    return memory_data(sources, sources=given, mix_by=stream["mix_by"], **options), sources


def contents(ranks: list[list[StepBatch]]) -> list[Counter[str]]:
    """Ids of each step over all ranks, in no order."""
    return [Counter(id for step in steps for id in step.ids) for steps in zip(*ranks, strict=True)]


def check_kills(stream: dict[str, Any], runs: list[tuple[int, int]]) -> None:
    """A run cut into pieces (steps, ranks) gives every step the samples of an uninterrupted one."""
    data, _ = open_stream(stream)
    options = {"seed": stream["seed"], "task": LengthTask(stream["max_length"])}
    total = sum(count for count, _ in runs)
    whole = steps_of(data, total, **options)
    pieces, states = [], None
    for count, world_size in runs:
        ranks = steps_of(data, count, world_size=world_size, states=states, **options)
        pieces.append(ranks)
        states = saved(ranks)
    assert [step for ranks in pieces for step in contents(ranks)] == contents(whole)
    if stream["batching"] != "packed":
        assert [step for ranks in pieces for step in merged(ranks)] == merged(whole)
    told = [one for ranks in pieces for steps in zip(*ranks, strict=True) for step in steps for one in step.rejected]
    expected = [one for step in whole[0] for one in step.rejected]
    assert Counter(told) == Counter(expected)
    last = Counter()
    for rank in pieces[-1]:
        last.update(rank[-1].counts)
    assert last == Counter(whole[0][-1].counts)


@settings(max_examples=100, suppress_health_check=[HealthCheck.filter_too_much])
@given(stream=streams, runs=st.lists(st.tuples(st.integers(1, 6), st.sampled_from(RANKS)), min_size=2, max_size=5))
def test_killed_and_resumed_on_other_ranks_the_trace_is_that_of_an_uninterrupted_run(
    stream: dict[str, Any], runs: list[tuple[int, int]]
) -> None:
    check_kills(stream, runs)


@pytest.mark.parametrize("sizes", [[30] * 30, [900]])
@pytest.mark.parametrize("second", [None, [20] * 24])
def test_what_was_rejected_is_told_once_whatever_the_kills(sizes: list[int], second: list[int] | None) -> None:
    stream = {
        "sizes": sizes, "second": second, "weight": 1.0, "mix_by": "samples", "block": 6, "batching": "bucketed",
        "max_length": 23, "seed": 1, "bad": {(shard, offset) for shard in range(30) for offset in (1, 4, 9, 20)},
    }  # fmt: skip
    check_kills(stream, [(1, 2), (2, 3), (1, 1), (3, 4), (1, 8), (5, 1)])


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["bucketed", "packed", "padded"])
@pytest.mark.parametrize("second", [None, [30] * 40])
def test_fifty_kills_change_nothing(batching: str, second: list[int] | None) -> None:
    draw = random.Random(f"{batching} {second}")
    stream = {
        "sizes": [draw.randrange(60) for _ in range(50)],
        "second": second,
        "weight": [[0, 0.3], [40, 1.5]],
        "mix_by": "tokens",
        "block": 7,
        "batching": batching,
        "max_length": 11,
        "seed": 3,
        "bad": {(draw.randrange(50), draw.randrange(20)) for _ in range(9)},
    }
    check_kills(stream, [(draw.randrange(1, 6), draw.choice(RANKS)) for _ in range(51)])


@settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much])
@given(stream=streams, world_size=st.sampled_from(RANKS), epochs=st.integers(1, 3))
def test_every_record_is_seen_exactly_once_an_epoch(stream: dict[str, Any], world_size: int, epochs: int) -> None:
    data, sources = open_stream({**stream, "second": None})
    ranks = steps_of(data, None, world_size, seed=stream["seed"], epochs=epochs, task=LengthTask(stream["max_length"]))
    seen = Counter(id for steps in ranks for step in steps for id in step.ids if "#" not in id)
    assert seen == Counter(dict.fromkeys(sources[""].good(), epochs))
    positions = sum(step.num_target_tokens for steps in ranks for step in steps)
    assert positions == epochs * sum(record["length"] for record in usable(sources[""]))


def usable(source: MemorySource) -> list[Any]:
    everything = (record for index in range(len(source.sizes)) for record in source.open(index, 0))
    return [record for record in everything if isinstance(record, dict)]


@pytest.mark.parametrize("sizes", [[97], [30] * 30])
def test_finished_ranks_go_on_with_empty_steps_and_more_epochs_lose_nothing(sizes: list[int]) -> None:
    data = memory_data(MemorySource(sizes), lanes=24, block=8)
    first = steps_of(data, 64, world_size=4, epochs=1)
    for steps in first:
        assert steps[-1].exhausted and steps[-1].num_samples == 0 and steps[-1].micro_batches == []
        assert steps[-1].epoch == 1.0
    second = steps_of(data, 64, world_size=2, epochs=2, states=saved(first))
    seen = Counter(id for ranks in (first, second) for steps in ranks for step in steps for id in step.ids)
    assert set(seen.values()) == {2} and len(seen) == sum(sizes)


@pytest.mark.parametrize(("sizes", "limit"), [([20_000], 600), ([200] * 100, 24 * 40)])
def test_resuming_late_reads_no_more_than_resuming_early(sizes: list[int], limit: int) -> None:
    source = MemorySource(sizes)
    data = memory_data(source, lanes=24, block=20)
    late = steps_of(data, 600)  # 14,400 records in
    states = saved(late)
    source.opened.clear()
    source.num_read = 0
    steps_of(data, 1, states=states)
    assert source.num_read <= limit + 24 * 20 * 2
    assert all(offset > 0 or len(sizes) > 24 for _, offset in source.opened)


def test_the_state_is_small() -> None:
    data = memory_data(MemorySource([100] * 100), lanes=24, block=20)
    (steps,) = steps_of(data, 30)
    assert set(steps[-1].lane_states) == set(range(24))
    assert len(json.dumps(steps[-1].lane_states)) < 24 * 250


def test_epochs_differ_and_seeds_differ() -> None:
    data = memory_data(MemorySource([96]), lanes=24, block=20)
    trace = [id for step in merged(steps_of(data, 8)) for id in step]
    assert set(trace[:96]) == set(trace[96:]) and trace[:96] != trace[96:]
    assert trace != [id for step in merged(steps_of(data, 8, seed=1)) for id in step]


def test_without_shuffle_and_bucket_the_order_is_that_of_the_file() -> None:
    data = memory_data(MemorySource([50, 46]), lanes=24, block=2, shuffle=False, batching="padded")
    trace = [id for step in merged(steps_of(data, 4)) for id in step]
    assert trace == [f"s0:{number}" for number in range(50)] + [f"s1:{number}" for number in range(46)]


@pytest.mark.parametrize("sizes", [[9600], [96] * 100])
def test_shuffling_spreads_neighbours(sizes: list[int]) -> None:
    data = memory_data(MemorySource(sizes), lanes=24, block=400, batching="padded")
    trace = [id for step in merged(steps_of(data, 400)) for id in step]
    places = np.array([sum(sizes[: int(s)]) + int(o) for s, o in (id[1:].split(":") for id in trace)])
    assert abs(np.corrcoef(places, np.arange(len(places)))[0, 1]) < 0.1


def test_bucketing_pads_little_in_either_way_of_reading() -> None:
    for sizes in ([9600], [96] * 100):
        fractions = []
        for batching in ("bucketed", "padded"):
            data = memory_data(MemorySource(sizes), lanes=24, block=400, batching=batching)
            steps = [step for rank in steps_of(data, 200, global_size=48, world_size=2) for step in rank]
            fractions.append(sum(s.num_padding for s in steps) / sum(s.num_positions for s in steps))
        assert fractions[0] < 0.1 < 0.3 < fractions[1]


def test_progress_is_told_in_epochs() -> None:
    data = memory_data(MemorySource([96]), lanes=24, block=20)
    (steps,) = steps_of(data, 8)
    assert [step.epoch for step in steps] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0])


def test_lanes_that_do_not_divide_are_refused_with_numbers_that_do() -> None:
    data = memory_data(MemorySource([96]))
    with pytest.raises(
        ConfigError, match=r"data.lanes=48 does not divide over 5 ranks: run on 1, 2, 3, 4, 6, 8, 12, 16, 24, 48"
    ):
        loader_of(data, global_size=25, world_size=5)


def test_a_source_without_a_usable_record_is_refused() -> None:
    data = memory_data(MemorySource([5], frozenset((0, number) for number in range(5))), lanes=24, max_bad_fraction=1.0)
    with pytest.raises(DataError, match="No usable record"):
        raise next(iter(loader_of(data))).failure


def test_the_order_is_fixed_for_good() -> None:
    """A change here breaks the resuming of every run begun before it."""
    order = Order(seed=3, lanes=4, block=3, global_size=6, shuffle=True, batching="bucketed")
    assert order.shards(6, epoch=1) == GOLDEN_SHARDS
    lengths = [(5,), (1,), (9,), (3,), (7,), (2,), (8,), (4,), (6,), (0,), (10,), (11,)]
    assert order.arrange((0, 0, 0), np.arange(12), lengths) == GOLDEN_BLOCK
