"""Lanes: cursors that draw records block by block, put each block in its order and emit it row by row.

A lane's place is a `Position` (where its block begins) and a turn; nothing else need be saved, and reading on from it
costs one block, wherever it is.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from trainer.data.mixture import Mixture
from trainer.data.order import Order
from trainer.data.packing import pack
from trainer.data.reader import Place, RecordReader, Rejected, Sample


@dataclass(frozen=True, slots=True)
class Position:
    """Where a block begins.

    places: in each source; credits: of each source in the mixture (see `Mixture`); block: counted from 0, within the
    epoch where there is one source; first: turn of the block's first row; done: rows of this epoch before the block;
    last: rows of the epoch before (0: unknown), by which progress within an epoch is told; counts: records that were
    rejected or changed before the block, by stage.
    """

    places: tuple[Place, ...]
    credits: tuple[float, ...]
    block: int = 0
    first: int = 0
    done: int = 0
    last: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def epoch(self) -> int:
        """Of the only source; 0 in a mixture, whose sources have epochs of their own."""
        return self.places[0][0] if len(self.places) == 1 else 0

    def to_state(self) -> dict[str, Any]:
        """JSON-able; `from_state` reads it back to the last bit."""
        return {
            "places": [list(place) for place in self.places],
            "credits": list(self.credits),
            "block": self.block,
            "first": self.first,
            "done": self.done,
            "last": self.last,
            "counts": dict(self.counts),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The position that `to_state` wrote."""
        places = tuple((epoch, shard, offset) for epoch, shard, offset in state["places"])
        return cls(**{**state, "places": places, "credits": tuple(state["credits"])})


def is_lane_state(state: Mapping[str, Any]) -> bool:
    """Whether `state` has the form of a position's `to_state` with the `place` in the stream: nothing else is gone on
    from."""
    try:
        position = Position.from_state({name: value for name, value in state.items() if name != "place"})
        numbers = [state["place"], position.block, position.first, position.done, position.last]
        numbers += [*position.counts.values(), *(number for place in position.places for number in place)]
        return all(operator.index(number) >= 0 for number in numbers) and all(map(math.isfinite, position.credits))
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


@dataclass(frozen=True, slots=True)
class Row:
    """What a lane emits in a turn: one sample, or those that share a packed row. `lengths`: see `Sample`."""

    samples: tuple[Sample, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rules:
    """What all lanes of a stream go by.

    max_epochs: passes over each source, None = any number; row_lengths: of packed rows on each side, None = no packing.
    """

    order: Order
    mixture: Mixture
    max_epochs: Sequence[float | None]
    row_lengths: tuple[int, ...] | None

    def active(self, places: Sequence[Place]) -> list[bool]:
        """Which sources still have records for a lane at `places`."""
        return [limit is None or place[0] < limit for place, limit in zip(places, self.max_epochs, strict=True)]

    def finished(self, position: Position) -> bool:
        """Whether a lane at `position` has nothing more to give."""
        active = self.active(position.places)
        stopped = any(end == "stop" and not there for end, there in zip(self.mixture.at_ends, active, strict=True))
        return stopped or not any(active)


class BlockReader:
    """Reads blocks in parts, so that the next block can be prepared while the present one is emitted."""

    def __init__(self, readers: Sequence[RecordReader], rules: Rules, index: int, stride: int) -> None:
        """`index`, `stride`: see `Lane`."""
        self._readers = readers
        self._rules = rules
        self._index = index
        self._stride = stride
        self._block = rules.order.block * rules.order.lanes // stride
        self._whole_epoch: list[Sample] | None = None

    def begin(self, position: Position) -> None:
        """Read the block at `position` next."""
        self._position = position
        self._places = list(position.places)
        self._credits = position.credits
        self._samples: list[Sample] = []
        self._rejected: list[Rejected] = []
        self._changed: Counter[str] = Counter()
        self._num_drawn = 0
        self._fill = 0.0
        self._phase = self._rules.mixture.phase(self._step(0.0))
        self._complete = self._rules.finished(position)
        if self._whole_epoch is not None and position.block == 0 and not self._complete:
            self._samples = self._whole_epoch
            self._places = [(position.epoch + 1, 0, 0)]
            self._complete = True
        else:
            for reader, place in zip(self._readers, self._places, strict=True):
                reader.seek(place)

    @property
    def share(self) -> float:
        """How much of the block is read, 0 to 1."""
        return 1.0 if self._complete else self._num_drawn / self._block

    def prefetch(self) -> bool:
        """Let the next part of each source be encoded in other threads; whether there was something to begin."""
        if self._complete:
            return False
        active = self._rules.active(self._places)
        return any([reader.prefetch() for reader, there in zip(self._readers, active, strict=True) if there])

    def read_part(self, count: int) -> None:
        """Draw `count` more records, or fewer where the block is complete before."""
        for _ in range(count):
            if self._complete:
                return
            self._draw()

    def finish(self) -> tuple[list[Sample], list[Rejected], Position]:
        """The samples of the block, read to its end, what was rejected, and where the next one begins.

        That position's `first` and `done` are still this block's: they count rows, which the lane makes.
        """
        while not self._complete:
            self._draw()
        begin = self._position
        counts = Counter(begin.counts)
        counts.update(one.stage for one in self._rejected)
        counts.update(self._changed)
        following = replace(begin, places=tuple(self._places), credits=self._credits, counts=dict(counts))
        if following.epoch == begin.epoch:
            return self._samples, self._rejected, replace(following, block=begin.block + 1)
        if self._stride == 1 and begin.block == 0 and self._samples and not self._readers[0].epochs_differ:
            self._whole_epoch = self._samples  # small enough to be encoded once and kept
        return self._samples, self._rejected, replace(following, block=0)

    def _draw(self) -> None:
        if len(self._readers) == 1:
            self._take(0)
            return
        mixture = self._rules.mixture
        active = self._rules.active(self._places)
        if mixture.phase(self._step(self._fill)) != self._phase and self._samples:
            self._complete = True  # other weights hold from here on
            return
        source = mixture.choose(self._credits, active, self._phase)
        samples = self._take(source)
        if samples:
            self._fill += sum(map(self._share_of_row, samples))
            units = sum(sample.encoded.num_target_tokens for sample in samples) if mixture.by == "tokens" else 1
            self._credits = mixture.charge(self._credits, active, self._phase, source, float(units))

    def _take(self, source: int) -> list[Sample]:
        """Draw from one source; no samples where it gave none."""
        drawn = self._readers[source].draw()
        ended = drawn.after[0] > self._places[source][0]
        self._places[source] = drawn.after
        self._rejected += drawn.rejected
        if drawn.changed:
            self._changed.update(drawn.changed)
        if drawn.samples:
            self._samples += drawn.samples
            self._num_drawn += 1
            self._complete = self._num_drawn >= self._block
        elif ended:
            places = tuple(self._places)
            self._complete = len(places) == 1 or self._rules.finished(replace(self._position, places=places))
        return drawn.samples

    def _share_of_row(self, sample: Sample) -> float:
        lengths = self._rules.row_lengths
        return 1.0 if lengths is None else max(map(operator.truediv, sample.sides, lengths))

    def _step(self, fill: float) -> int:
        """The optimizer step of the row behind `fill` rows of this block."""
        place = (self._position.first + int(fill)) * self._stride + self._index
        return place // self._rules.order.global_size


class Lane:
    """One stream of rows. Lane `index` of `stride` fills the places index, index + stride ... of the whole stream.

    Its turns are counted from 0: turn t is place index + stride * t. Turns are asked for in ascending order.
    """

    def __init__(self, index: int, stride: int, readers: Sequence[RecordReader], rules: Rules) -> None:
        """`readers` read the lane's own shards: all of them where `stride` is 1 and the lane the whole stream."""
        self._index = index
        self._stride = stride
        self._readers = readers
        self._rules = rules
        self._reader = BlockReader(readers, rules, index, stride)
        self._rejected: list[Rejected] = []
        self.seek(Position(((0, 0, 0),) * len(readers), rules.mixture.first_credits(index)), turn=0)

    def seek(self, position: Position, turn: int) -> None:
        """Go on with the block at `position`, of which the rows before `turn` have been emitted."""
        self._position = position
        self._following = position
        self._rows: list[Row] | None = None
        self._told = turn > position.first
        self._reader.begin(position)

    def at(self, turn: int) -> Row | None:
        """The row of a turn; None when the lane has finished. Reads on as far as it takes."""
        while True:
            if self._rows is None:
                if self._rules.finished(self._position):
                    return None
                self._load()
            elif turn - self._position.first < len(self._rows):
                return self._rows[turn - self._position.first]
            else:
                self._position, self._rows, self._told = self._following, None, False

    def prefetch(self) -> None:
        """Begin on the block at hand, which `at` will ask for."""
        if self._rows is None:
            self._reader.prefetch()

    def take_rejected(self) -> list[Rejected]:
        """What was rejected in the blocks begun since the last call."""
        rejected, self._rejected = self._rejected, []
        return rejected

    def work_ahead(self, turn: int) -> None:
        """Begin on a part of the next block when it is time, or finish it: evenly over this block, one lane after
        another."""
        if self._rows is None:
            return
        share = (turn - self._position.first + 1) / len(self._rows)
        if self._reader.share + self._index / self._rules.order.lanes < share and not self._reader.prefetch():
            self._reader.read_part(self._rules.order.block)

    def state(self, turn: int) -> dict[str, Any]:
        """Where turn `turn` is found again, for `Position.from_state`."""
        passed = self._rows is not None and turn >= self._following.first
        position = self._following if passed else self._position
        if self._rules.finished(position):
            position = replace(position, first=max(position.first, turn))  # more epochs would begin at this turn
        return position.to_state()

    @property
    def counts(self) -> Mapping[str, int]:
        """Records rejected or changed so far, by stage, the present block's included."""
        return self._position.counts if self._rows is None else self._following.counts

    def epochs(self, turn: int) -> float:
        """Epochs done before turn `turn`: of the source that is furthest behind in a mixture."""
        begin = self._position
        if len(self._readers) > 1 or self._rules.finished(begin) or self._rows is None:
            return min(map(self._shards_done, range(len(self._readers))))
        size = begin.done + len(self._rows) if self._following.epoch > begin.epoch else begin.last
        if not size:
            return self._shards_done(0)
        return begin.epoch + min(1.0, (begin.done + min(turn - begin.first, len(self._rows))) / size)

    def _shards_done(self, source: int) -> float:
        """Epochs done in a source, counted in whole shards."""
        epoch, shard, _ = self._position.places[source]
        num_shards = self._readers[source].sequence.num_shards(epoch)
        return epoch + shard / num_shards if num_shards else float(epoch)

    def _load(self) -> None:
        """Complete the block at hand and put it in order; the next one can then be begun."""
        begin = self._position
        samples, rejected, following = self._reader.finish()
        if len(self._readers) == 1:
            samples = sorted(samples, key=lambda sample: sample.key)  # whatever this epoch's order of shards is
        self._rows = self._arranged(self._joined(samples))
        if not self._told:
            self._rejected += rejected
            self._told = True
        first, done = begin.first + len(self._rows), begin.done + len(self._rows)
        if following.epoch > begin.epoch:
            following = replace(following, first=first, done=0, last=done)
        else:
            following = replace(following, first=first, done=done)
        self._following = following
        self._reader.begin(following)

    def _joined(self, samples: list[Sample]) -> list[Sample]:
        """What tasks that join samples make of those of a block, each source for itself.

        It begins at another sample in every epoch and goes round, so what is joined differs, and neighbours in the
        data stay neighbours.
        """
        if not any(reader.joins for reader in self._readers):
            return samples
        begin, joined = self._position, []
        for source, reader in enumerate(self._readers):
            own = [sample for sample in samples if sample.key[0] == source]
            first = self._rules.order.first((self._index, begin.epoch, begin.block, source), len(own))
            joined += reader.join(own[first:] + own[:first])
        return joined

    def _arranged(self, samples: list[Sample]) -> list[Row]:
        """The rows of a block in the order in which they are emitted."""
        begin, order = self._position, self._rules.order
        key = (self._index, begin.epoch, begin.block)
        if self._rules.row_lengths is None:
            turns = np.arange(begin.first, begin.first + len(samples), dtype=np.int64)
            arranged = order.arrange(key, turns * self._stride + self._index, [sample.lengths for sample in samples])
            return [Row((samples[index],), samples[index].lengths) for index in arranged]
        if not samples:
            return []
        samples = [samples[index] for index in order.shuffled(key, len(samples))]
        lengths = np.asarray([sample.sides for sample in samples], np.int64)
        rows = pack(lengths, self._rules.row_lengths)
        size = (sum(self._rules.row_lengths), *self._rules.row_lengths)
        return [
            Row(tuple(samples[index] for index in rows[row]), size)
            for row in order.shuffled((*key, len(rows)), len(rows))
        ]
