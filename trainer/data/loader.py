"""The loader: this rank's share of every global batch, as micro-batches, prepared in a background thread."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from trainer.data.lanes import Position, Row, Rules
from trainer.data.reader import Rejected
from trainer.errors import ConfigError
from trainer.tasks import PacksRows

if TYPE_CHECKING:
    from trainer.data.corpus import Stream
    from trainer.plan import RunPlan
    from trainer.tasks import Batch, Task


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one rank does in one step.

    micro_batches: this rank's, longest samples first; none when it has no samples. ids: of each sample in the order of
    the stream (see `Sample`). num_samples, num_target_tokens, num_positions, num_padding: of this rank. epoch: epochs
    done after this step, mean over this rank's lanes. lane_states: JSON-able, this rank's lanes after this step.
    exhausted: this rank has no samples, and never will again. rejected: records in the blocks that this step began on,
    each told by one rank; counts: all that this rank's lanes rejected or changed so far, by stage, for a sum over
    ranks. failure: why there is no batch: the stream broke; the state is that of the step before.
    """

    micro_batches: list[Batch]
    ids: list[str]
    num_samples: int
    num_target_tokens: int
    num_positions: int
    num_padding: int
    epoch: float
    lane_states: dict[int, dict[str, Any]]
    exhausted: bool
    rejected: list[Rejected]
    counts: Mapping[str, int]
    failure: BaseException | None = None


NO_BATCH = StepBatch([], [], 0, 0, 0, 0, 0.0, {}, False, [], {})
"""No samples, from nowhere."""


class Loader:
    """Endless iterator over StepBatch; the global batches do not depend on the number of ranks or micro-batches.

    With fewer shards than lanes every rank reads and encodes the whole source and keeps its share; a large source
    should have more. After the last epoch it goes on with empty steps, so that ranks that finish apart stay together.
    """

    def __init__(self, stream: Stream, task: Task, plan: RunPlan, rank: int, prefetch: int = 2) -> None:
        """`prefetch`: steps prepared ahead, >= 1. Raises ConfigError where the lanes do not divide over the ranks."""
        lanes = stream.rules.order.lanes
        if lanes % plan.world_size:
            fitting = ", ".join(str(size) for size in range(1, lanes + 1) if lanes % size == 0)
            raise ConfigError(
                f"data.lanes={lanes} does not divide over {plan.world_size} ranks: run on {fitting} ranks,"
                f" or set data.lanes to a multiple of {plan.world_size} (which changes the order of the samples)."
            )
        self._task = task
        self._plan = plan
        self._rank = rank
        self._rules: Rules = stream.rules
        self._stride = stream.stride
        """Lanes that read for themselves; 1: a single reader for all of them."""
        self._lanes = range(rank, lanes, plan.world_size)
        self._readers = {index: stream.lane(index) for index in (self._lanes if self._stride > 1 else [0])}
        self._tells = self._stride > 1 or rank == 0
        """Whether this rank tells what its readers rejected; of ranks that read the same, one does."""
        self._place = 0
        """Place in the whole stream where the next step begins, the same on all ranks."""
        self._queue: SimpleQueue[StepBatch] = SimpleQueue()
        self._slots = threading.Semaphore(prefetch)
        self._stop = False
        self._thread: threading.Thread | None = None

    def load_lane_states(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        """Go on where `lane_states` of a step left off; `states` holds this rank's lanes or more. Before iterating."""
        assert self._thread is None, "the loader is already running"
        for index, lane in self._readers.items():
            state = dict(states[index if self._stride > 1 else self._rank])
            self._place = state.pop("place")
            lane.seek(Position.from_state(state), self._turn(index))

    def __iter__(self) -> Iterator[StepBatch]:
        """Start the background thread and wait for each step in turn; what goes wrong there is a step's `failure`."""
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
            step = self._queue.get()
            self._slots.release()
            yield step
            if step.failure is not None:
                raise step.failure

    def _produce(self) -> None:
        while True:
            self._slots.acquire()
            if self._stop:
                return
            try:
                step = self._step()
            except BaseException as error:  # handed over, whatever it is
                self._queue.put(replace(NO_BATCH, failure=error))
                return
            self._queue.put(step)

    def _step(self) -> StepBatch:
        world_size, rank_size = self._plan.world_size, self._plan.rank_size
        first = self._place + (self._rank - self._place) % world_size
        rows: list[Row] = []
        for place in range(first, first + rank_size * world_size, world_size):
            lane, turn = self._readers[place % self._stride], place // self._stride
            row = lane.at(turn)
            lane.work_ahead(turn)
            if row is not None:
                rows.append(row)
        self._place += self._plan.global_size
        if self._stride == 1 and self._tells:
            self._readers[0].at(self._place - 1)  # begin on every block that another rank has begun on
        micro_batches = [
            self._collate(part) for part in split_micro_batches(rows, self._plan.micro_size, self._plan.micro_tokens)
        ]
        positions = [self._task.num_positions(batch) for batch in micro_batches]
        samples = [sample for row in rows for sample in row.samples]
        turns = {index: self._turn(index) for index in self._readers}
        states = {index: {**lane.state(turns[index]), "place": self._place} for index, lane in self._readers.items()}
        rejected = [one for lane in self._readers.values() for one in lane.take_rejected()]
        return StepBatch(
            micro_batches=micro_batches,
            ids=[sample.id for sample in samples],
            num_samples=len(samples),
            num_target_tokens=sum(sample.encoded.num_target_tokens for sample in samples),
            num_positions=sum(number for number, _ in positions),
            num_padding=sum(padding for _, padding in positions),
            epoch=sum(lane.epochs(turns[index]) for index, lane in self._readers.items()) / len(self._readers),
            lane_states={index: states[index % self._stride] for index in self._lanes},
            exhausted=not rows and all(lane.at(turns[index]) is None for index, lane in self._readers.items()),
            rejected=rejected if self._tells else [],
            counts=sum((Counter(lane.counts) for lane in self._readers.values()), Counter()) if self._tells else {},
        )

    def _turn(self, index: int) -> int:
        """The first turn of a reader at or after the place where the next step begins."""
        return -((index - self._place) // self._stride)

    def _collate(self, rows: Sequence[Row]) -> Batch:
        if self._rules.row_lengths is None:
            batch = self._task.collate([sample.encoded for row in rows for sample in row.samples])
        else:
            assert isinstance(self._task, PacksRows), "the stream packs only for such tasks"
            packed = [[sample.encoded for sample in row.samples] for row in rows]
            batch = self._task.collate_rows(packed, self._rules.row_lengths)
        return batch


def split_micro_batches(rows: Sequence[Row], micro_size: int | None, micro_tokens: int | None) -> list[list[Row]]:
    """Cut rows, longest first, into micro-batches of at most `micro_size` rows or `micro_tokens` positions.

    Positions are padded ones, of all fields together. A row that is over the budget goes alone.
    """
    ordered = sorted(rows, key=lambda row: row.lengths, reverse=True)
    if micro_tokens is None:
        size = micro_size or max(1, len(ordered))
        return [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]
    parts: list[list[Row]] = []
    longest: tuple[int, ...] = ()
    for row in ordered:
        fields = row.lengths[1:]
        widened = tuple(map(max, longest, fields)) if parts else fields
        if parts and sum(widened) * (len(parts[-1]) + 1) <= micro_tokens:
            parts[-1].append(row)
            longest = widened
        else:
            parts.append([row])
            longest = fields
    return parts
