"""The loader: this rank's share of every global batch, as micro-batches, prepared in a background thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from queue import SimpleQueue
from typing import TYPE_CHECKING

from trainer.data.lanes import Encoder, Lane, Position, Sample, ShardSequence
from trainer.data.order import Order
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.data.stream import StreamData
    from trainer.plan import RunPlan
    from trainer.tasks import Batch, Task


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one rank does in one step.

    micro_batches: this rank's, longest samples first; none when it has no samples. ids: "shard:offset" of each sample
    in the order of the stream. num_samples, num_target_tokens, num_positions, num_padding: of this rank. epoch: epochs
    done after this step, mean over this rank's lanes. lane_states: JSON-able, this rank's lanes after this step.
    exhausted: this rank will never have samples again.
    """

    micro_batches: list[Batch]
    ids: list[str]
    num_samples: int
    num_target_tokens: int
    num_positions: int
    num_padding: int
    epoch: float
    lane_states: dict[int, dict[str, int]]
    exhausted: bool


class Loader:
    """Endless iterator over StepBatch; the global batches do not depend on the number of ranks or micro-batches.

    With fewer shards than lanes every rank reads and encodes the whole source and keeps its share; a large source
    should have more. After `max_epochs` it goes on with empty steps, so that ranks that finish apart stay together.
    """

    def __init__(
        self,
        data: StreamData,
        task: Task,
        plan: RunPlan,
        rank: int,
        seed: int,
        max_epochs: float | None = None,
        prefetch: int = 2,
    ) -> None:
        """`prefetch`: steps prepared ahead, >= 1. Raises ConfigError where the lanes do not divide over the ranks."""
        if data.lanes % plan.world_size:
            fitting = ", ".join(str(size) for size in range(1, data.lanes + 1) if data.lanes % size == 0)
            raise ConfigError(
                f"data.lanes={data.lanes} does not divide over {plan.world_size} ranks: run on {fitting} ranks,"
                f" or set data.lanes to a multiple of {plan.world_size} (which changes the order of the samples)."
            )
        self._task = task
        self._plan = plan
        self._rank = rank
        self._max_epochs = max_epochs
        self._source = data.source("train")
        order = Order(seed, data.lanes, data.block, plan.global_size, data.shuffle, data.bucket)
        encoder = Encoder(self._source, task, data.max_bad_fraction)
        num_shards = len(self._source.shards)

        @lru_cache(maxsize=4)
        def shards(epoch: int) -> list[int]:
            return order.shards(num_shards, epoch)

        def lane(index: int, stride: int) -> Lane:
            sequence = ShardSequence(self._source, lambda epoch: shards(epoch)[index::stride])
            return Lane(index, stride, sequence, encoder, order, max_epochs)

        self._stride = data.lanes if num_shards >= data.lanes else 1
        """Lanes that read for themselves; 1: a single reader for all of them."""
        self._lanes = range(rank, data.lanes, plan.world_size)
        self._readers = {index: lane(index, self._stride) for index in (self._lanes if self._stride > 1 else [0])}
        self._place = 0
        """Place in the whole stream where the next step begins, the same on all ranks."""
        self._queue: SimpleQueue[StepBatch | BaseException] = SimpleQueue()
        self._slots = threading.Semaphore(prefetch)
        self._stop = False
        self._thread: threading.Thread | None = None

    def load_lane_states(self, states: Mapping[int, Mapping[str, int]]) -> None:
        """Go on where `lane_states` of a step left off; `states` holds this rank's lanes or more. Before iterating."""
        assert self._thread is None, "the loader is already running"
        for index, lane in self._readers.items():
            state = dict(states[index if self._stride > 1 else self._rank])
            self._place = state.pop("place")
            lane.seek(Position(**state))

    def __iter__(self) -> Iterator[StepBatch]:
        """Start the background thread and wait for each step in turn; whatever went wrong there is raised here."""
        assert self._thread is None, "the loader is already running"
        self._thread = threading.Thread(target=self._produce, name="loader", daemon=True)
        self._thread.start()
        return self._consume()

    def close(self) -> None:
        """End the background thread."""
        self._stop = True
        self._slots.release()
        if self._thread is not None:
            self._thread.join(
                timeout=10
            )  # a stalled network must not hold up the end of the run; the thread is a daemon

    def _consume(self) -> Iterator[StepBatch]:
        while True:
            item = self._queue.get()
            self._slots.release()
            if isinstance(item, BaseException):
                raise item
            yield item

    def _produce(self) -> None:
        try:
            while True:
                self._slots.acquire()
                if self._stop:
                    return
                self._queue.put(self._step())
        except BaseException as error:  # handed over, whatever it is
            self._queue.put(error)

    def _step(self) -> StepBatch:
        world_size, rank_size = self._plan.world_size, self._plan.rank_size
        first = self._place + (self._rank - self._place) % world_size
        samples = []
        for place in range(first, first + rank_size * world_size, world_size):
            lane, turn = self._readers[place % self._stride], place // self._stride
            sample = lane.at(turn)
            lane.work_ahead(turn)
            if sample is not None:
                samples.append(sample)
        self._place += self._plan.global_size
        micro_batches = [
            self._task.collate([sample.encoded for sample in part])
            for part in split_micro_batches(samples, self._plan.micro_size, self._plan.micro_tokens)
        ]
        positions = [self._task.num_positions(batch) for batch in micro_batches]
        turns = {
            index: -((index - self._place) // self._stride) for index in self._readers
        }  # first at or after the place
        exhausted = self._max_epochs is not None and all(
            lane.at(turns[index]) is None for index, lane in self._readers.items()
        )
        states = {index: {**lane.state(turns[index]), "place": self._place} for index, lane in self._readers.items()}
        return StepBatch(
            micro_batches=micro_batches,
            ids=[f"{self._source.shards[sample.shard]}:{sample.offset}" for sample in samples],
            num_samples=len(samples),
            num_target_tokens=sum(sample.encoded.num_target_tokens for sample in samples),
            num_positions=sum(number for number, _ in positions),
            num_padding=sum(padding for _, padding in positions),
            epoch=sum(lane.epochs(turns[index]) for index, lane in self._readers.items()) / len(self._readers),
            lane_states={index: states[index % self._stride] for index in self._lanes},
            exhausted=exhausted,
        )


def split_micro_batches(
    samples: Sequence[Sample], micro_size: int | None, micro_tokens: int | None
) -> list[list[Sample]]:
    """Cut samples, longest first, into micro-batches of at most `micro_size` samples or `micro_tokens` positions.

    Positions are padded ones, of all fields together. A sample that is over the budget goes alone.
    """
    ordered = sorted(samples, key=lambda sample: sample.lengths, reverse=True)
    if micro_tokens is None:
        size = micro_size or max(1, len(ordered))
        return [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]
    parts: list[list[Sample]] = []
    longest: tuple[int, ...] = ()
    for sample in ordered:
        fields = sample.lengths[1:]
        widened = tuple(map(max, longest, fields)) if parts else fields
        if parts and sum(widened) * (len(parts[-1]) + 1) <= micro_tokens:
            parts[-1].append(sample)
            longest = widened
        else:
            parts.append([sample])
            longest = fields
    return parts
