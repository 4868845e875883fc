"""The data of a run with the tasks that read it: the training stream, and the samples of an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from trainer.data.dataset import Dataset
from trainer.data.lanes import Lane, Rules
from trainer.data.order import Order
from trainer.data.reader import BAD_RECORD, Encoder, RecordReader, ShardSequence
from trainer.data.stages import Changed, NeedsPass, Removed, Stage
from trainer.data.stream import StreamData
from trainer.errors import ConfigError
from trainer.tasks import BadRecord, Encoded, JoinsSamples, PacksRows, Record, Task

_log = logging.getLogger(__name__)

_ENCODE_RECORDS = 512
"""Records that a task or a stage gets at once."""

_SURVEYED_RECORDS = 1000
"""Records at the beginning of the data by which the sides of packed rows are shaped."""


@dataclass(frozen=True, slots=True)
class EvaluationSample:
    """A sample of an evaluation. `index`: its place among the usable ones of the split; task: of its source; record: of
    joined samples the first of those that were joined."""

    index: int
    record: Record
    encoded: Encoded
    task: Task


def prefix_of(source: str) -> str:
    """What the ids of a source begin with; nothing where it is the only one."""
    return f"{source}/" if source else ""


class Corpus:
    """The data sets of a run, each with its task and stages."""

    def __init__(
        self, data: StreamData, tasks: Mapping[str, Task], stages: Mapping[str, Sequence[Stage]] | None = None
    ) -> None:
        """tasks, stages: by the name of the source ("" where there is one alone)."""
        self.data = data
        self.tasks = tasks
        self.stages = stages or {}

    @property
    def count_names(self) -> list[str]:
        """What `StepBatch.counts` may count: bad records, and what each stage removed or changed."""
        return [BAD_RECORD, *dict.fromkeys(stage.name for stages in self.stages.values() for stage in stages)]

    @property
    def mixed(self) -> list[str]:
        """The sources of a mixture; [] where there is one alone."""
        return list(self.data.sources) if len(self.data.sources) > 1 else []

    def check(self, split: str) -> None:
        """Raise DataError unless the first record of every source's split has its task's columns."""
        for name in self._with(split):
            self.data.datasets[name].check(split, self.tasks[name].required_columns)

    def first_sample(self) -> Encoded:
        """The first usable sample of the train split. Raises ConfigError if there is none."""
        for _, encoded, _ in self._usable("train", at_once=1):
            return encoded
        raise ConfigError(
            "data.train holds no record that the task can use; check the columns and maximum lengths of the task."
        )

    def evaluation_samples(
        self, split: str, rank: int, world_size: int, max_samples: int | None
    ) -> list[EvaluationSample]:
        """Every `world_size`-th, from `rank` on, of the first `max_samples` usable samples, source by source in file
        order."""
        return [
            EvaluationSample(index, record, encoded, task)
            for index, (record, encoded, task) in enumerate(islice(self._usable(split), max_samples))
            if index % world_size == rank
        ]

    def _usable(self, split: str, at_once: int = _ENCODE_RECORDS) -> Iterator[tuple[Record, Encoded, Task]]:
        for name in self._with(split):
            task = self.tasks[name]
            records = (record for _, record in self.data.datasets[name].records(split))
            while part := list(islice(records, at_once)):
                usable = [
                    (record, piece)
                    for record, encoded in zip(part, task.encode(part), strict=True)
                    if not isinstance(encoded, BadRecord)
                    for piece in task.pieces(encoded)
                ]
                if usable and isinstance(task, JoinsSamples):
                    usable = [(usable[0][0], one) for one in task.join([piece for _, piece in usable])]
                yield from ((record, piece, task) for record, piece in usable)

    def _with(self, split: str) -> list[str]:
        """The sources that have a split; a single source must."""
        datasets = self.data.datasets
        return [name for name, dataset in datasets.items() if len(datasets) == 1 or dataset.has(split)]


class Stream:
    """The training stream: what it reads, and the rules by which lanes order it."""

    def __init__(
        self,
        corpus: Corpus,
        seed: int,
        global_size: int,
        max_epochs: float | None = None,
    ) -> None:
        """global_size: rows of a step; max_epochs: passes over a single source, None = any number.

        Raises ConfigError for options that do not fit the data or the task.
        """
        self._data = data = corpus.data
        self._tasks = tasks = corpus.tasks
        options = list(data.sources.values())
        if max_epochs is not None and len(options) > 1:
            raise ConfigError(
                f"stop.epochs={max_epochs:g} has no meaning for a mixture, whose sources differ in size;"
                " set data.sources.NAME.at_end=stop or drop, or stop.tokens."
            )
        self._sources = [dataset.source("train") for dataset in data.datasets.values()]
        self.row_lengths = self._packed_row_lengths() if data.batching == "packed" else None
        self.rules = Rules(
            Order(seed, data.lanes, data.block, global_size, data.shuffle, data.batching),
            data.mixture(seed),
            [max_epochs if one.at_end == "repeat" else 1.0 for one in options],
            self.row_lengths,
        )
        self.stride = self._choose_stride()
        self._encoders = [
            Encoder(
                number,
                prefix_of(name),
                source,
                tasks[name],
                corpus.stages.get(name, ()),
                data.max_bad_fraction,
                self._sides(tasks[name]) if self.row_lengths else None,
                seed,
            )
            for number, (name, source) in enumerate(zip(data.sources, self._sources, strict=True))
        ]
        self.workers = data.workers
        self._shard_orders: dict[tuple[int, int], list[int]] = {}

    def lane(self, index: int) -> Lane:
        """A new lane at the beginning; with `stride` 1 the only one, for the whole stream."""
        readers = [
            RecordReader(ShardSequence(source, self._shards_of(number, index)), encoder, self._data.block)
            for number, (source, encoder) in enumerate(zip(self._sources, self._encoders, strict=True))
        ]
        return Lane(index, self.stride, readers, self.rules)

    def _shards_of(self, source: int, lane: int) -> Callable[[int], Sequence[int]]:
        return lambda epoch: self._shard_order(source, epoch)[lane :: self.stride]

    def _shard_order(self, source: int, epoch: int) -> list[int]:
        """The order of an epoch's shards, kept for the lanes that follow."""
        if (source, epoch) not in self._shard_orders:
            self._shard_orders.pop((source, epoch - 2), None)
            order = self.rules.order.shards(len(self._sources[source].shards), epoch)
            self._shard_orders[source, epoch] = order
        return self._shard_orders[source, epoch]

    def _choose_stride(self) -> int:
        """Lanes that read for themselves: all of them, or 1 where a source has too few shards. Says what that costs."""
        lanes = self._data.lanes
        few = [number for number, source in enumerate(self._sources) if len(source.shards) < lanes]
        if not few:
            return lanes
        for number in few:
            if reason := getattr(self._sources[number], "uncut", None):
                _log.warning(
                    "%s; with fewer shards than data.lanes=%d every rank reads and encodes all of it, and a resume"
                    " reads it from the beginning. scripts/data/prepare.py cuts it into shards.",
                    reason,
                    lanes,
                )
        return 1

    @staticmethod
    def _sides(task: Task) -> Callable[[Encoded], tuple[int, ...]]:
        if not isinstance(task, PacksRows):
            raise ConfigError(
                f"data.batching=packed: samples of {type(task).__name__} cannot share rows; use data.batching=bucketed."
            )
        return task.sides

    def _packed_row_lengths(self) -> tuple[int, ...]:
        """Positions of a packed row on each side; by default shaped as the first records of the data are."""
        name, dataset = next(iter(self._data.datasets.items()))
        task = self._tasks[name]
        sides = self._sides(task)
        longest = max(one.max_length or 0 for one in self._tasks.values())
        samples = [sides(encoded) for encoded in _first_encoded(dataset, task)]
        if not samples:
            raise ConfigError(
                f"data.batching=packed: none of the first {_SURVEYED_RECORDS} records of {name} is usable."
            )
        totals = np.asarray(samples).sum(axis=0)
        given = self._data.row_length
        if given is None:
            return _shaped(totals.tolist(), longest)
        lengths = (given,) * len(totals) if isinstance(given, int) else tuple(given)
        if len(lengths) != len(totals) or min(lengths) < longest:
            raise ConfigError(
                f"data.row_length={given} must be a number, or a list of {len(totals)}, of at least {longest}, the"
                " task's longest sample; raise it, or lower the task's maximum length."
            )
        return lengths


def survey(stage: NeedsPass, before: Sequence[Stage], dataset: Dataset, prefix: str) -> Any:
    """What a stage finds in a pass over the train split, as the stages `before` it leave the records.

    prefix: what the ids of the source begin with.
    """
    _log.info("stage %s reads the train split of %s once", stage.name, dataset.path)
    records: Iterator[tuple[str, Record]] = ((f"{prefix}{place}", record) for place, record in dataset.records("train"))
    for one in before:
        records = _through(one, records)
    return stage.survey(records)


def _through(stage: Stage, records: Iterator[tuple[str, Record]]) -> Iterator[tuple[str, Record]]:
    while part := list(islice(records, _ENCODE_RECORDS)):
        results = stage.apply([place for place, _ in part], [record for _, record in part])
        for (place, _), result in zip(part, results, strict=True):
            if not isinstance(result, Removed):
                yield place, result.record if isinstance(result, Changed) else result


def _first_encoded(dataset: Dataset, task: Task) -> list[Encoded]:
    records = [record for _, record in islice(dataset.records("train"), _SURVEYED_RECORDS)]
    encoded = (one for one in task.encode(records) if not isinstance(one, BadRecord))
    return [piece for one in encoded for piece in task.pieces(one)]


def _shaped(totals: Sequence[int], longest: int) -> tuple[int, ...]:
    """One side: the longest sample. Several: twice that on the side with the most, the others in proportion."""
    if len(totals) == 1:
        return (longest,)
    shares = [total / max(totals) for total in totals]
    return tuple(max(longest, 8 * round(2 * longest * share / 8)) for share in shares)
