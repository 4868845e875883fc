"""The stream is a function of (data, seed, epoch): not of ranks, micro-batches, kills or resumes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.data.loader import Loader, StepBatch
from trainer.data.order import Order
from trainer.data.stream import StreamData
from trainer.errors import ConfigError, DataError
from trainer.plan import RunPlan
from trainer.tasks import BadRecord, Encoded, Record

RANKS = (1, 2, 3, 4, 6, 8)
GOLDEN_SHARDS = [3, 2, 5, 0, 1, 4]
GOLDEN_BLOCK = [9, 1, 5, 3, 7, 0, 8, 4, 6, 2, 10, 11]


class MemorySource:
    """Shards of numbered records; notes what was opened and how much was read."""

    def __init__(self, sizes: Sequence[int], bad: frozenset[tuple[int, int]] = frozenset()) -> None:
        self.sizes = sizes
        self.bad = bad
        self.opened: list[tuple[int, int]] = []
        self.num_read = 0

    @property
    def shards(self) -> list[str]:
        return [f"s{index}" for index in range(len(self.sizes))]

    def open(self, shard_index: int, offset: int) -> Iterator[Record | BadRecord]:
        self.opened.append((shard_index, offset))
        for number in range(offset, self.sizes[shard_index]):
            self.num_read += 1
            length = 1 + (7 * shard_index + 13 * number) % 23
            yield BadRecord("torn") if (shard_index, number) in self.bad else {"length": length}


class MemoryData(StreamData):
    """A train split held in memory."""

    def __init__(self, source: MemorySource, **options: Any) -> None:
        super().__init__("memory", **options)
        self.memory = source

    def source(self, split: str) -> MemorySource:
        return self.memory


class LengthTask:
    """A record is a row of as many ones as its length says."""

    def encode(self, records: Sequence[Record]) -> list[Encoded | BadRecord]:
        return [Encoded({"ids": np.ones(r["length"], np.int32)}, r["length"], r["length"]) for r in records]

    def collate(self, samples: Sequence[Encoded]) -> Any:
        width = max(sample.length for sample in samples)
        return {"labels": np.array([[1] * s.length + [0] * (width - s.length) for s in samples])}

    def num_positions(self, batch: Any) -> tuple[int, int]:
        return batch["labels"].size, int((batch["labels"] == 0).sum())


def plan(
    global_size: int, world_size: int = 1, micro_size: int | None = None, micro_tokens: int | None = None
) -> RunPlan:
    rank_size = global_size // world_size
    return RunPlan(
        world_size, global_size, rank_size, micro_size, None, micro_tokens, "fp32", "plain", 0, False, False, 1.0
    )


def steps_of(
    data: StreamData, count: int, global_size: int = 24, world_size: int = 1, states: Any = None, **options: Any
):
    """The first `count` steps of every rank, as a list of lists of StepBatch."""
    ranks = []
    for rank in range(world_size):
        loader = Loader(
            data, LengthTask(), plan(global_size, world_size), rank, options.get("seed", 0), options.get("epochs")
        )
        if states is not None:
            loader.load_lane_states(states)
        ranks.append(list(islice(loader, count)))
        loader.close()
    return ranks


def merged(ranks: list[list[StepBatch]]) -> list[list[str]]:
    """Ids of each step over all ranks, in the order of the stream."""
    return [
        [id for group in zip(*(step.ids for step in steps), strict=True) for id in group]
        for steps in zip(*ranks, strict=True)
    ]


def saved(ranks: list[list[StepBatch]]) -> dict[int, dict[str, int]]:
    """What a checkpoint after the last step would hold, through JSON and back."""
    states: dict[int, dict[str, int]] = {}
    for steps in ranks:
        states |= steps[-1].lane_states
    return {int(lane): state for lane, state in json.loads(json.dumps(states)).items()}


streams = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(
            lambda sizes: sum(sizes) >= 1 and sum(map(bool, sizes)) * 2 >= len(sizes)
        ),
        "block": st.integers(1, 20),
        "bucket": st.booleans(),
        "seed": st.integers(0, 5),
        "bad": st.sets(st.tuples(st.integers(0, 60), st.integers(0, 5)), max_size=5),
    }
)


def open_stream(stream: dict[str, Any]) -> MemoryData:
    sizes = list(stream["sizes"])
    sizes[0] += 6  # at least one good record, whatever is bad
    source = MemorySource(sizes, frozenset(stream["bad"]))
    return MemoryData(source, lanes=24, block=stream["block"], bucket=stream["bucket"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(stream=streams, runs=st.lists(st.tuples(st.integers(1, 6), st.sampled_from(RANKS)), min_size=2, max_size=5))
def test_killed_and_resumed_on_other_ranks_the_trace_is_that_of_an_uninterrupted_run(
    stream: dict[str, Any], runs: list[tuple[int, int]]
) -> None:
    data = open_stream(stream)
    total = sum(count for count, _ in runs)
    expected = merged(steps_of(data, total, seed=stream["seed"]))
    trace: list[list[str]] = []
    states = None
    for count, world_size in runs:
        ranks = steps_of(data, count, world_size=world_size, states=states, seed=stream["seed"])
        trace += merged(ranks)
        states = saved(ranks)
    assert trace == expected


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(stream=streams, world_size=st.sampled_from(RANKS), epochs=st.integers(1, 3))
def test_every_record_is_seen_exactly_once_an_epoch(stream: dict[str, Any], world_size: int, epochs: int) -> None:
    data = open_stream(stream)
    source = data.memory
    seen: Counter[str] = Counter()
    for rank in range(world_size):
        loader = Loader(data, LengthTask(), plan(24, world_size), rank, stream["seed"], max_epochs=epochs)
        for step in loader:
            seen.update(step.ids)
            if step.exhausted:
                break
        loader.close()
    good = {f"s{s}:{o}" for s, size in enumerate(source.sizes) for o in range(size) if (s, o) not in source.bad}
    assert seen == Counter(dict.fromkeys(good, epochs))


@pytest.mark.parametrize("sizes", [[97], [30] * 30])
def test_finished_ranks_go_on_with_empty_steps_and_more_epochs_lose_nothing(sizes: list[int]) -> None:
    data = MemoryData(MemorySource(sizes), lanes=24, block=8)
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
    data = MemoryData(source, lanes=24, block=20)
    late = steps_of(data, 600)  # 14,400 records in
    states = saved(late)
    source.opened.clear()
    source.num_read = 0
    steps_of(data, 1, states=states)
    assert source.num_read <= limit + 24 * 20 * 2
    assert all(offset > 0 or len(sizes) > 24 for _, offset in source.opened)


def test_the_state_is_small() -> None:
    data = MemoryData(MemorySource([100] * 100), lanes=24, block=20)
    (steps,) = steps_of(data, 30)
    assert set(steps[-1].lane_states) == set(range(24))
    assert len(json.dumps(steps[-1].lane_states)) < 24 * 200


def test_epochs_differ_and_seeds_differ() -> None:
    data = MemoryData(MemorySource([96]), lanes=24, block=20)
    trace = [id for step in merged(steps_of(data, 8)) for id in step]
    assert set(trace[:96]) == set(trace[96:]) and trace[:96] != trace[96:]
    assert trace != [id for step in merged(steps_of(data, 8, seed=1)) for id in step]


def test_without_shuffle_and_bucket_the_order_is_that_of_the_file() -> None:
    data = MemoryData(MemorySource([50, 46]), lanes=24, block=2, shuffle=False, bucket=False)
    trace = [id for step in merged(steps_of(data, 4)) for id in step]
    assert trace == [f"s0:{number}" for number in range(50)] + [f"s1:{number}" for number in range(46)]


@pytest.mark.parametrize("sizes", [[9600], [96] * 100])
def test_shuffling_spreads_neighbours(sizes: list[int]) -> None:
    data = MemoryData(MemorySource(sizes), lanes=24, block=400, bucket=False)
    trace = [id for step in merged(steps_of(data, 400)) for id in step]
    places = np.array([sum(sizes[: int(s)]) + int(o) for s, o in (id[1:].split(":") for id in trace)])
    assert abs(np.corrcoef(places, np.arange(len(places)))[0, 1]) < 0.1


def test_bucketing_pads_little_in_either_way_of_reading() -> None:
    for sizes in ([9600], [96] * 100):
        fractions = []
        for bucket in (True, False):
            data = MemoryData(MemorySource(sizes), lanes=24, block=400, bucket=bucket)
            steps = [step for rank in steps_of(data, 200, global_size=48, world_size=2) for step in rank]
            fractions.append(sum(s.num_padding for s in steps) / sum(s.num_positions for s in steps))
        assert fractions[0] < 0.1 < 0.3 < fractions[1]


def test_progress_is_told_in_epochs() -> None:
    data = MemoryData(MemorySource([96]), lanes=24, block=20)
    (steps,) = steps_of(data, 8)
    assert [step.epoch for step in steps] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0])


def test_lanes_that_do_not_divide_are_refused_with_numbers_that_do() -> None:
    data = MemoryData(MemorySource([96]))
    with pytest.raises(
        ConfigError, match=r"data.lanes=48 does not divide over 5 ranks: run on 1, 2, 3, 4, 6, 8, 12, 16, 24, 48"
    ):
        Loader(data, LengthTask(), plan(25, 5), 0, 0)


def test_a_source_without_a_usable_record_is_refused() -> None:
    data = MemoryData(MemorySource([5], frozenset((0, number) for number in range(5))), lanes=24)
    with pytest.raises(DataError, match="No usable record"):
        next(iter(Loader(data, LengthTask(), plan(24), 0, 0)))


def test_the_order_is_fixed_for_good() -> None:
    """A change here breaks the resuming of every run begun before it."""
    order = Order(seed=3, lanes=4, block=3, global_size=6, shuffle=True, bucket=True)
    assert order.shards(6, epoch=1) == GOLDEN_SHARDS
    lengths = [(5,), (1,), (9,), (3,), (7,), (2,), (8,), (4,), (6,), (0,), (10,), (11,)]
    assert order.arrange((0, 0, 0), np.arange(12), lengths) == GOLDEN_BLOCK
