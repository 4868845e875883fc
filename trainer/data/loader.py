"""The loader: this rank's share of every global batch, as micro-batches, prepared in a background thread."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from trainer.data.lanes import is_lane_state
from trainer.errors import CheckpointError
from trainer.tasks import PacksRows

if TYPE_CHECKING:
    from trainer.data.dealers import Dealer
    from trainer.data.lanes import Row
    from trainer.data.mixture import MixBy
    from trainer.data.reader import Rejected, Sample
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
    ranks. drawn: of a mixture, what each source gave of this rank's samples, in what its weights count. failure: why
    there is no batch: the stream broke; the state is that of the step before.
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
    drawn: Mapping[str, int] = field(default_factory=dict)
    failure: BaseException | None = None


NO_BATCH = StepBatch([], [], 0, 0, 0, 0, 0.0, {}, False, [], {})
"""No samples, from nowhere."""


class Loader:
    """Endless iterator over StepBatch; the global batches do not depend on the number of ranks, workers or
    micro-batches.

    With fewer shards than lanes every rank reads and encodes the whole source and keeps its share; a large source
    should have more. After the last epoch it goes on with empty steps, so that ranks that finish apart stay together.
    """

    def __init__(
        self,
        dealers: Sequence[Dealer],
        task: Task,
        plan: RunPlan,
        row_lengths: tuple[int, ...] | None = None,
        prefetch: int = 2,
        mixed: Sequence[str] = (),
        mix_by: MixBy = "samples",
    ) -> None:
        """dealers: of this rank; row_lengths: of packed rows, None = nothing is packed; prefetch: steps prepared ahead,
        >= 1; mixed: the sources of a mixture, in the order of the keys of their samples; mix_by: what weights count."""
        self._dealers = dealers
        self._task = task
        self._plan = plan
        self._row_lengths = row_lengths
        self._mixed = mixed
        self._mix_by = mix_by
        self._queue: SimpleQueue[StepBatch] = SimpleQueue()
        self._slots = threading.Semaphore(prefetch)
        self._stop = False
        self._thread: threading.Thread | None = None

    def load_lane_states(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        """Go on where `lane_states` of a step left off; `states` holds this rank's lanes or more. Before iterating.

        Raises CheckpointError where these are no states of lanes.
        """
        assert self._thread is None, "the loader is already running"
        wrong = next((index for index, state in states.items() if not is_lane_state(state)), None)
        try:
            for dealer in self._dealers if wrong is None else ():
                dealer.load_lane_states(states)
        except KeyError as error:
            wrong = error.args[0]
        if wrong is not None:
            raise CheckpointError(
                f"The checkpoint's state.json has no position of lane {wrong} as a save writes it; it is damaged."
            )

    def __iter__(self) -> Iterator[StepBatch]:
        """Start the background thread and wait for each step in turn; what goes wrong there is a step's `failure`."""
        assert self._thread is None, "the loader is already running"
        self._thread = threading.Thread(target=self._produce, name="loader", daemon=True)
        self._thread.start()
        return self._consume()

    def close(self) -> None:
        """End the background thread and the workers."""
        self._stop = True
        self._slots.release()
        for dealer in self._dealers:
            dealer.close()
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
        dealt = [dealer.deal() for dealer in self._dealers]
        rows = [row for _, row in sorted((item for one in dealt for item in one.rows), key=lambda item: item[0])]
        micro_batches = [
            self._collate(part) for part in split_micro_batches(rows, self._plan.micro_size, self._plan.micro_tokens)
        ]
        positions = [self._task.num_positions(batch) for batch in micro_batches]
        samples = [sample for row in rows for sample in row.samples]
        return StepBatch(
            micro_batches=micro_batches,
            ids=[sample.id for sample in samples],
            num_samples=len(samples),
            num_target_tokens=sum(sample.encoded.num_target_tokens for sample in samples),
            num_positions=sum(number for number, _ in positions),
            num_padding=sum(padding for _, padding in positions),
            epoch=sum(one.epoch for one in dealt) / len(dealt),
            lane_states={lane: state for one in dealt for lane, state in one.lane_states.items()},
            exhausted=all(one.exhausted for one in dealt),
            rejected=[rejected for one in dealt for rejected in one.rejected],
            counts=sum((Counter(one.counts) for one in dealt), Counter()),
            drawn=self._drawn(samples),
        )

    def _drawn(self, samples: Sequence[Sample]) -> Mapping[str, int]:
        drawn: Counter[str] = Counter()
        for sample in samples if self._mixed else ():
            drawn[self._mixed[sample.key[0]]] += sample.encoded.num_target_tokens if self._mix_by == "tokens" else 1
        return drawn

    def _collate(self, rows: Sequence[Row]) -> Batch:
        if self._row_lengths is None:
            batch = self._task.collate([sample.encoded for row in rows for sample in row.samples])
        else:
            assert isinstance(self._task, PacksRows), "the stream packs only for such tasks"
            packed = [[sample.encoded for sample in row.samples] for row in rows]
            batch = self._task.collate_rows(packed, self._row_lengths)
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if _pins() else batch


@cache
def _pins() -> bool:
    """Whether batches go to a GPU, which copies faster from pinned memory, and while it computes."""
    import torch

    return torch.cuda.is_available()


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
