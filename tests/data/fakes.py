"""Data in memory and tasks without text, for tests of the stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from trainer.data.corpus import Corpus, Stream
from trainer.data.dataset import Dataset
from trainer.data.dealers import make_dealers
from trainer.data.loader import Loader, StepBatch
from trainer.data.stream import StreamData
from trainer.plan import RunPlan
from trainer.tasks import BadRecord, Encoded, Record

RANKS = (1, 2, 3, 4, 6, 8)


class MemorySource:
    """Shards of numbered records; notes what was opened and how much was read."""

    def __init__(self, sizes: Sequence[int], bad: frozenset[tuple[int, int]] = frozenset(), longest: int = 23) -> None:
        self.sizes = sizes
        self.bad = bad
        self.longest = longest
        self.opened: list[tuple[int, int]] = []
        self.num_read = 0

    @property
    def shards(self) -> list[str]:
        return [f"s{index}" for index in range(len(self.sizes))]

    def open(self, shard_index: int, offset: int) -> Iterator[Record | BadRecord]:
        self.opened.append((shard_index, offset))
        for number in range(offset, self.sizes[shard_index]):
            self.num_read += 1
            length = 1 + (7 * shard_index + 13 * number) % self.longest
            yield BadRecord("torn") if (shard_index, number) in self.bad else {"length": length}

    def good(self) -> set[str]:
        """Ids of all records that can be used."""
        return {f"s{s}:{o}" for s, size in enumerate(self.sizes) for o in range(size) if (s, o) not in self.bad}


class MemoryDataset(Dataset):
    """A train split held in memory."""

    def __init__(self, memory: MemorySource) -> None:
        super().__init__("data", "memory")
        self.memory = memory

    def source(self, split: str) -> MemorySource:  # type: ignore[override]
        return self.memory

    def records(self, split: str) -> Iterator[tuple[str, Record]]:
        for index, shard in enumerate(self.memory.shards):
            for offset, record in enumerate(self.memory.open(index, 0)):
                if not isinstance(record, BadRecord):
                    yield f"{shard}:{offset}", record


def memory_data(memory: MemorySource | Mapping[str, MemorySource], **options: Any) -> StreamData:
    """A train split, or a mixture of them (with `sources`: their options), held in memory."""
    if isinstance(memory, MemorySource):
        data, memory = StreamData("memory", **options), {"": memory}
    else:
        given = options.pop("sources", {})
        data = StreamData(sources={name: {"path": name, **given.get(name, {})} for name in memory}, **options)
    data.datasets = {name: MemoryDataset(source) for name, source in memory.items()}
    return data


class LengthTask:
    """A record is a row of as many ones as its length says; longer than `max_length`, it goes on in further pieces."""

    required_columns = ()

    def __init__(self, max_length: int = 1000) -> None:
        self.max_length = max_length

    def encode(self, records: Sequence[Record]) -> list[Encoded | BadRecord]:
        return [Encoded({"ids": np.ones(r["length"], np.int32)}, r["length"], r["length"]) for r in records]

    def pieces(self, sample: Encoded) -> list[Encoded]:
        lengths = [min(self.max_length, sample.length - at) for at in range(0, sample.length, self.max_length)]
        return [Encoded({"ids": np.ones(length, np.int32)}, length, length) for length in lengths]

    def collate(self, samples: Sequence[Encoded]) -> Any:
        width = max(sample.length for sample in samples)
        return {"labels": np.array([[1] * s.length + [0] * (width - s.length) for s in samples])}

    def num_positions(self, batch: Any) -> tuple[int, int]:
        return batch["labels"].size, int((batch["labels"] == 0).sum())

    def sides(self, sample: Encoded) -> tuple[int, ...]:
        return (sample.length,)

    def collate_rows(self, rows: Sequence[Sequence[Encoded]], row_lengths: tuple[int, ...]) -> Any:
        sizes = [sum(sample.length for sample in row) for row in rows]
        assert max(sizes) <= row_lengths[0]
        return {"labels": np.array([[1] * size + [0] * (row_lengths[0] - size) for size in sizes])}


def plan(
    global_size: int, world_size: int = 1, micro_size: int | None = None, micro_tokens: int | None = None
) -> RunPlan:
    rank_size = global_size // world_size
    return RunPlan(
        world_size,
        global_size,
        rank_size,
        micro_size,
        None,
        micro_tokens,
        "fp32",
        "plain",
        0,
        "none",
        "none",
        1.0,
    )


def loader_of(
    data: StreamData,
    task: Any = None,
    global_size: int = 24,
    world_size: int = 1,
    rank: int = 0,
    seed: int = 0,
    epochs: float | None = None,
    micro_size: int | None = None,
    micro_tokens: int | None = None,
    stages: Callable[[str], Sequence[Any]] = lambda name: (),
) -> Loader:
    """The loader of one rank; every source is read by `task`."""
    task = task or LengthTask()
    corpus = Corpus(data, dict.fromkeys(data.datasets, task), {name: stages(name) for name in data.datasets})
    stream = Stream(corpus, seed, global_size, epochs)
    run_plan = plan(global_size, world_size, micro_size, micro_tokens)
    return Loader(make_dealers(stream, rank, world_size), task, run_plan, stream.row_lengths)


def steps_of(
    data: StreamData, count: int | None, world_size: int = 1, states: Any = None, **options: Any
) -> list[list[StepBatch]]:
    """The first `count` steps of every rank (None: up to where all are exhausted), as a list of lists of StepBatch."""
    ranks = []
    for rank in range(world_size):
        loader = loader_of(data, world_size=world_size, rank=rank, **options)
        if states is not None:
            loader.load_lane_states(states)
        steps = []
        for step in islice(loader, count):
            if step.failure is not None:
                raise step.failure
            steps.append(step)
            if count is None and step.exhausted:
                break
        ranks.append(steps)
        loader.close()
    return ranks


def merged(ranks: list[list[StepBatch]]) -> list[list[str]]:
    """Ids of each step over all ranks; in the order of the stream where nothing is packed."""
    return [
        [id for group in zip(*(step.ids for step in steps), strict=True) for id in group]
        for steps in zip(*ranks, strict=True)
    ]


def saved(ranks: list[list[StepBatch]]) -> dict[int, dict[str, Any]]:
    """What a checkpoint after the last step would hold, through JSON and back."""
    states: dict[int, dict[str, Any]] = {}
    for steps in ranks:
        states |= steps[-1].lane_states
    return {int(lane): state for lane, state in json.loads(json.dumps(states)).items()}
