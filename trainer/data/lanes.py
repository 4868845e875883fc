"""Lanes: cursors that read a source block by block, encode each block and emit it in its order.

A lane's place is a `Position` (where its block begins) and a turn; nothing else need be saved, and reading on from it
costs one block, wherever it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from trainer.data.order import Order
from trainer.data.sources import Source
from trainer.errors import DataError
from trainer.tasks import BadRecord, Encoded, Record, Task

_log = logging.getLogger(__name__)

_MAX_EMPTY_EPOCHS = 100
"""Epochs in a row that may give a lane nothing (its shards happened to be empty) before it is an error."""

_MIN_RECORDS = 1000
"""Bad records are compared with a fraction of at least so many, lest one bad record end a run that has just begun."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a block begins.

    epoch, block: counts from 0, `block` within the epoch; shard: place in the epoch's order of shards; offset: record
    in that shard; first: turn of the block's first sample; done: samples of this epoch before the block; last: samples
    of the epoch before (0: unknown), by which progress within an epoch is told.
    """

    epoch: int = 0
    block: int = 0
    shard: int = 0
    offset: int = 0
    first: int = 0
    done: int = 0
    last: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """An encoded record and where it came from. `lengths`: sort key of bucketing."""

    shard: int
    offset: int
    encoded: Encoded
    lengths: tuple[int, ...]


Row = tuple[int, int, Record | BadRecord]
"""Shard index, offset in it, and what is there."""


class ShardSequence:
    """The shards of an epoch, one after the other, readable from any place; the last place is kept open."""

    def __init__(self, source: Source, order: Callable[[int], Sequence[int]]) -> None:
        """`order`: epoch -> indices of the shards to read."""
        self._source = source
        self._order = order
        self._next: tuple[int, int, int] | None = None
        self._rows: Iterator[Record | BadRecord] = iter(())

    def num_shards(self, epoch: int) -> int:
        """Shards of an epoch."""
        return len(self._order(epoch))

    def take(self, epoch: int, shard: int, offset: int, count: int) -> tuple[list[Row], int, int, int]:
        """Up to `count` rows from a place on, and the place behind them; fewer only at the end of the epoch."""
        order = self._order(epoch)
        rows: list[Row] = []
        while len(rows) < count and shard < len(order):
            index = order[shard]
            try:
                if self._next != (epoch, shard, offset):
                    self._rows = self._source.open(index, offset)
                for record in self._rows:
                    rows.append((index, offset, record))
                    offset += 1
                    if len(rows) == count:
                        break
                else:
                    shard, offset = shard + 1, 0
                    self._next = None
                    continue
            except Exception as error:
                self._next = None
                error.add_note(f"while reading {self._source.shards[index]} at record {offset}")
                raise
        self._next = (epoch, shard, offset)
        if shard == len(order):
            epoch, shard, offset, self._next = epoch + 1, 0, 0, None
        return rows, epoch, shard, offset


class Encoder:
    """Rows to samples. Bad ones are skipped and counted; more than `max_bad_fraction` of them is an error."""

    def __init__(self, source: Source, task: Task, max_bad_fraction: float) -> None:
        self._source = source
        self._task = task
        self._max_bad_fraction = max_bad_fraction
        self.num_records = 0
        self.num_bad = 0
        self._first_bad = ""

    def encode(self, rows: Sequence[Row]) -> list[Sample]:
        """Encode rows in one call of the task. Raises DataError naming the first bad one when there are too many."""
        records = [record for _, _, record in rows if not isinstance(record, BadRecord)]
        try:
            results = self._task.encode(records) if records else []
        except Exception as error:
            begin, end = rows[0], rows[-1]
            names = self._source.shards
            error.add_note(
                f"while encoding {names[begin[0]]} from record {begin[1]} to {names[end[0]]} record {end[1]}"
            )
            raise
        assert len(results) == len(records), "a task gives one result per record"
        remaining = iter(results)
        samples: list[Sample] = []
        for shard, offset, record in rows:
            result = record if isinstance(record, BadRecord) else next(remaining)
            if isinstance(result, BadRecord):
                self._reject(f"{self._source.shards[shard]}:{offset}", result.reason)
            else:
                lengths = (result.length, *(len(array) if array.ndim else 1 for array in result.fields.values()))
                samples.append(Sample(shard, offset, result, lengths))
        self.num_records += len(rows)
        if self.num_bad > self._max_bad_fraction * max(self.num_records, _MIN_RECORDS):
            raise DataError(
                f"{self.num_bad} of the first {self.num_records} records cannot be used, more than"
                f" data.max_bad_fraction={self._max_bad_fraction}; the first is {self._first_bad}."
                " Mend the data, or raise data.max_bad_fraction."
            )
        return samples

    def _reject(self, place: str, reason: str) -> None:
        if not self.num_bad:
            self._first_bad = f"{place}: {reason}"
            _log.warning("skipped the bad record %s: %s (further ones are counted, not shown)", place, reason)
        self.num_bad += 1


class BlockReader:
    """Reads and encodes blocks in parts, so that the next block can be prepared while the present one is emitted."""

    def __init__(
        self, sequence: ShardSequence, encoder: Encoder, block: int, part: int, same_every_epoch: bool
    ) -> None:
        """`block`, `part`: records; `same_every_epoch`: an epoch that fits one block is encoded once and kept."""
        self._sequence = sequence
        self._encoder = encoder
        self._block = block
        self._part = part
        self._same_every_epoch = same_every_epoch
        self._whole_epoch: list[Sample] | None = None

    def begin(self, position: Position) -> None:
        """Read the block at `position` next."""
        self._position = position
        self._samples: list[Sample] = []
        self._num_read = 0
        self._place = (position.epoch, position.shard, position.offset)
        if self._whole_epoch is not None and position.block == 0:
            self._samples = self._whole_epoch
            self._place = (position.epoch + 1, 0, 0)

    @property
    def share(self) -> float:
        """How much of the block is read, 0 to 1."""
        return 1.0 if self._place[0] > self._position.epoch else self._num_read / self._block

    def read_part(self) -> None:
        """Read and encode the next part of the block."""
        rows, *place = self._sequence.take(*self._place, min(self._part, self._block - self._num_read))
        self._place = (place[0], place[1], place[2])
        self._num_read += len(rows)
        self._samples += self._encoder.encode(rows)

    def finish(self) -> tuple[list[Sample], Position]:
        """The samples of the block, which is read to its end, and where the next one begins."""
        while self.share < 1.0:
            self.read_part()
        begin, samples = self._position, self._samples
        first, done = begin.first + len(samples), begin.done + len(samples)
        epoch, shard, offset = self._place
        if epoch == begin.epoch:
            return samples, Position(epoch, begin.block + 1, shard, offset, first, done, begin.last)
        if self._same_every_epoch and begin.block == 0:
            self._whole_epoch = samples
        return samples, Position(epoch, first=first, last=done)


class Lane:
    """One stream of samples. Lane `index` of `stride` fills the places index, index + stride ... of the whole stream.

    Its turns are counted from 0: turn t is place index + stride * t. Turns are asked for in ascending order.
    """

    def __init__(
        self,
        index: int,
        stride: int,
        sequence: ShardSequence,
        encoder: Encoder,
        order: Order,
        max_epochs: float | None,
    ) -> None:
        """`sequence` holds the lane's own shards: all of them where `stride` is 1 and the lane the whole stream."""
        self._index = index
        self._stride = stride
        self._sequence = sequence
        self._order = order
        self._max_epochs = max_epochs
        block = order.block * order.lanes // stride
        self._reader = BlockReader(sequence, encoder, block, part=order.block, same_every_epoch=stride == 1)
        self._empty_epochs = 0
        self.seek(Position())

    def seek(self, position: Position) -> None:
        """Go on with the block at `position`."""
        self._position = position
        self._following = position
        self._samples: list[Sample] | None = None
        self._reader.begin(position)

    def at(self, turn: int) -> Sample | None:
        """The sample of a turn; None when the lane has finished its epochs. Reads on as far as it takes."""
        while not self._finished_epochs(self._position):
            if self._samples is None:
                self._load()
            elif turn - self._position.first < len(self._samples):
                return self._samples[turn - self._position.first]
            else:
                self._position, self._samples = self._following, None
        return None

    def work_ahead(self, turn: int) -> None:
        """Read and encode a part of the next block when it is time: evenly over this block, one lane after another."""
        if self._samples is None or self._finished_epochs(self._following):
            return
        share = (turn - self._position.first + 1) / len(self._samples)
        if self._reader.share + self._index / self._order.lanes < share:
            self._reader.read_part()

    def state(self, turn: int) -> dict[str, int]:
        """Where turn `turn` is found again: the fields of a Position."""
        passed = self._samples is not None and turn >= self._following.first
        position = self._following if passed else self._position
        if self._finished_epochs(position):
            position = replace(position, first=max(position.first, turn))  # more epochs would begin at this turn
        return asdict(position)

    def epochs(self, turn: int) -> float:
        """Epochs done before turn `turn`; within the first, if its size is unknown, counted in whole shards."""
        begin = self._position
        if self._finished_epochs(begin) or self._samples is None:
            return float(begin.epoch)
        ends = self._following.epoch > begin.epoch
        size = begin.done + len(self._samples) if ends else begin.last
        if not size:
            return begin.epoch + begin.shard / self._sequence.num_shards(begin.epoch)
        return begin.epoch + min(1.0, (begin.done + min(turn - begin.first, len(self._samples))) / size)

    def _load(self) -> None:
        """Complete the block at hand and put it in order; the next one can then be begun."""
        begin = self._position
        samples, self._following = self._reader.finish()
        samples = sorted(
            samples, key=lambda sample: (sample.shard, sample.offset)
        )  # whatever this epoch's order of shards
        turns = np.arange(begin.first, begin.first + len(samples), dtype=np.int64)
        order = self._order.arrange(
            (self._index, begin.epoch, begin.block),
            turns * self._stride + self._index,
            [sample.lengths for sample in samples],
        )
        self._samples = [samples[index] for index in order]
        self._reader.begin(self._following)
        if self._following.epoch > begin.epoch:
            self._empty_epochs = 0 if self._following.last else self._empty_epochs + 1
            if self._empty_epochs > _MAX_EMPTY_EPOCHS:
                raise DataError(
                    f"No usable record in {_MAX_EMPTY_EPOCHS} epochs of lane {self._index}: the source is empty, or too"
                    " many of its shards are. Remove the empty shards, or lower data.lanes."
                )

    def _finished_epochs(self, position: Position) -> bool:
        return self._max_epochs is not None and position.epoch >= self._max_epochs
