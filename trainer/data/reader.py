"""Reading one source record by record, encoded, with what could not be used; from any place and back."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from numpy.typing import NDArray

from trainer.data.sources import Source
from trainer.data.stages import Changed, Removed, Stage
from trainer.errors import DataError
from trainer.tasks import BadRecord, DrawsNoise, Encoded, JoinsSamples, Record, Task

_log = logging.getLogger(__name__)

BAD_RECORD = "bad_record"
"""The stage of records that cannot be read or that the task refuses."""

_MIN_RECORDS = 1000
"""Bad records are compared with a fraction of at least so many, lest one bad record end a run that has just begun."""

_THREADS, _CHUNK = 2, 512
"""Threads that encode, and records that one of them encodes at once."""

_MAX_EMPTY_EPOCHS = 100
"""Epochs in a row that may give a lane nothing (its shards happened to be empty) before it is an error."""

Place = tuple[int, int, int]
"""Where to read on: epoch, place in the epoch's order of shards, record in that shard."""


class Sample(NamedTuple):
    """A record, or a piece of one, made ready for batching, and where it came from.

    id: "shard:record", of a later piece "shard:record#piece", of a joined sample "shard:record+number", with the record
    that the joined ones begin with; key: sorts samples as their records stand in the data;
    lengths: sort key of bucketing (empty if packed); sides: positions on each side of a packed row (empty if not).
    """

    id: str
    key: tuple[int, ...]
    encoded: Encoded
    lengths: tuple[int, ...]
    sides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that gave no sample. stage: BAD_RECORD, or the name of the stage that removed it."""

    shard: str
    offset: int
    stage: str
    reason: str


class Drawn(NamedTuple):
    """The next usable record of a source: its samples, what was rejected on the way to it, what stages changed, by
    stage, and where to read on. Without samples where an epoch ends, or where rejected records stand at the end of a
    part. What is rejected or changed is told in the first epoch alone."""

    samples: list[Sample]
    after: Place
    rejected: Sequence[Rejected] = ()
    changed: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True)
class _Unusable:
    stage: str
    reason: str


class Row(NamedTuple):
    """What is at a record's place; `after`: where to read on."""

    shard: int
    offset: int
    record: Record | BadRecord
    after: Place


class ShardSequence:
    """The shards of an epoch, one after the other, readable from any place; the last place is kept open."""

    def __init__(self, source: Source, order: Callable[[int], Sequence[int]]) -> None:
        """`order`: epoch -> indices of the shards to read."""
        self._source = source
        self._order = order
        self._next: Place | None = None
        self._rows: Iterator[Record | BadRecord] = iter(())

    def num_shards(self, epoch: int) -> int:
        """Shards of an epoch."""
        return len(self._order(epoch))

    def take(self, place: Place, count: int) -> tuple[list[Row], Place]:
        """Up to `count` rows from a place on, and the place behind them; fewer only at the end of the epoch."""
        epoch, shard, offset = place
        order = self._order(epoch)
        rows: list[Row] = []
        while len(rows) < count and shard < len(order):
            index = order[shard]
            try:
                if self._next != (epoch, shard, offset):
                    self._rows = self._source.open(index, offset)
                for record in self._rows:
                    offset += 1
                    rows.append(Row(index, offset - 1, record, (epoch, shard, offset)))
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
        return rows, (epoch, shard, offset)


@dataclass(frozen=True, slots=True)
class _Pending:
    """Rows on their way through the task. results: what the stages left of each, to be replaced by what is encoded;
    changes: what they changed, by row; usable: the rows that go to the task."""

    rows: Sequence[Row]
    results: list[Any]
    changes: Mapping[int, Counter[str]]
    usable: Sequence[int]
    encoded: Future[list[Encoded | BadRecord]]


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="encode")


class Encoder:
    """Rows of one source to samples, through its stages and its task.

    Bad records are skipped and told; more than `max_bad_fraction` of them is an error, and so is the first if
    `max_bad_fraction` is 0.
    """

    def __init__(
        self,
        index: int,
        prefix: str,
        source: Source,
        task: Task,
        stages: Sequence[Stage],
        max_bad_fraction: float,
        sides: Callable[[Encoded], tuple[int, ...]] | None,
        seed: int = 0,
    ) -> None:
        """index, prefix: the source's number in a mixture, and what its shards' names begin with; sides: what a sample
        takes of a packed row, None = nothing is packed; seed: of the noise, for a task that draws it."""
        self._index = index
        self._names = [f"{prefix}{name}" for name in source.shards]
        self._task = task
        self._stages = stages
        self._max_bad_fraction = max_bad_fraction
        self._sides = sides
        self._seed = seed
        self.draws_noise = isinstance(task, DrawsNoise)
        self._num_records = 0
        self._num_bad = 0
        self._first_bad = ""

    def submit(self, rows: Sequence[Row]) -> _Pending:
        """Begin to encode rows in another thread: tokenizers leave Python's lock to others while they work."""
        results, changes = self._through_stages(rows)
        usable = [index for index, result in enumerate(results) if type(result) is not _Unusable]
        records: list[Record] = [results[index] for index in usable]  # type: ignore[misc]
        return _Pending(rows, results, changes, usable, _pool().submit(self._task.encode, records))

    def collect(self, pending: _Pending) -> list[Drawn]:
        """One Drawn for each usable row, and one without samples if rejected rows stand at the end.

        Raises DataError naming the first bad record when there are too many.
        """
        rows, outcomes = pending.rows, pending.results
        try:
            encoded = pending.encoded.result()
        except Exception as error:
            error.add_note(f"while encoding {self._id(rows[0])} to {self._id(rows[-1])}")
            raise
        assert len(encoded) == len(pending.usable), "a task gives one result per record"
        for index, one in zip(pending.usable, encoded, strict=True):
            outcomes[index] = _Unusable(BAD_RECORD, one.reason) if type(one) is BadRecord else one
        return list(self._drawn(rows, outcomes, pending.changes))

    def _through_stages(self, rows: Sequence[Row]) -> tuple[list[Record | _Unusable], dict[int, Counter[str]]]:
        """What the stages made of each row, and how much they changed in those they changed."""
        results: list[Record | _Unusable] = [
            _Unusable(BAD_RECORD, row.record.reason) if isinstance(row.record, BadRecord) else row.record
            for row in rows
        ]
        changes: dict[int, Counter[str]] = {}
        for stage in self._stages:
            there = [index for index, result in enumerate(results) if not isinstance(result, _Unusable)]
            ids = [self._id(rows[index]) for index in there]
            records: list[Record] = [results[index] for index in there]  # type: ignore[misc]
            for index, result in zip(there, stage.apply(ids, records), strict=True):
                if isinstance(result, Removed):
                    results[index] = _Unusable(stage.name, result.reason)
                elif isinstance(result, Changed):
                    results[index] = result.record
                    changes.setdefault(index, Counter())[stage.name] += result.count
        return results, changes

    def _drawn(
        self, rows: Sequence[Row], outcomes: Sequence[Any], changes: Mapping[int, Counter[str]]
    ) -> Iterator[Drawn]:
        rejected: list[Rejected] = []
        changed: Counter[str] = Counter()
        self._num_records += len(rows)
        for index, (row, outcome) in enumerate(zip(rows, outcomes, strict=True)):
            first_pass = row.after[0] == 0
            if first_pass and index in changes:
                changed += changes[index]
            if isinstance(outcome, _Unusable):
                self._judge(row, outcome)
                if first_pass:
                    rejected.append(Rejected(self._names[row.shard], row.offset, outcome.stage, outcome.reason))
                continue
            samples = [self._sample(row, piece, number) for number, piece in enumerate(self._task.pieces(outcome))]
            if rejected or changed:
                yield Drawn(samples, row.after, rejected, changed)
                rejected, changed = [], Counter()
            else:
                yield Drawn(samples, row.after)
        if self._num_bad > self._max_bad_fraction * max(self._num_records, _MIN_RECORDS):
            raise DataError(self._too_many())
        if rejected or changed:
            yield Drawn([], rows[-1].after, rejected, changed)

    @property
    def joins(self) -> bool:
        """Whether the task makes its samples of many records."""
        return isinstance(self._task, JoinsSamples)

    def join(self, samples: Sequence[Sample]) -> list[Sample]:
        """What the task makes of these samples of a block together: themselves, unless it `JoinsSamples`."""
        if not samples or not isinstance(self._task, JoinsSamples):
            return list(samples)
        first = samples[0]
        joined = self._task.join([sample.encoded for sample in samples])
        return [self._made(f"{first.id}+{number}", (*first.key, number), one) for number, one in enumerate(joined)]

    def _sample(self, row: Row, piece: Encoded, number: int) -> Sample:
        name = self._id(row)
        if self.draws_noise:
            piece = piece._replace(noise=_noise(self._seed, row.after[0], name, number))
        return self._made(f"{name}#{number}" if number else name, (self._index, row.shard, row.offset, number), piece)

    def _made(self, name: str, key: tuple[int, ...], encoded: Encoded) -> Sample:
        if self._sides is None:
            return Sample(name, key, encoded, (encoded.length, *map(_length_of, encoded.fields.values())), ())
        return Sample(name, key, encoded, (), self._sides(encoded))

    def _judge(self, row: Row, outcome: _Unusable) -> None:
        """Count a bad record, and raise DataError where none may be."""
        if outcome.stage != BAD_RECORD:
            return
        self._num_bad += 1
        if self._num_bad == 1:
            self._first_bad = f"{self._id(row)}: {outcome.reason}"
            if self._max_bad_fraction > 0:
                _log.warning(
                    "skipped the bad record %s (further ones are counted; all are in quarantine.jsonl)", self._first_bad
                )
        if self._max_bad_fraction == 0:
            raise DataError(self._too_many())

    def _too_many(self) -> str:
        if self._max_bad_fraction == 0:
            return f"Bad record {self._first_bad} (data.on_bad_record=fail). Mend it, or set data.on_bad_record=skip."
        return (
            f"{self._num_bad} of the first {self._num_records} records cannot be used, more than"
            f" data.max_bad_fraction={self._max_bad_fraction}; the first is {self._first_bad}."
            " Mend the data, or raise data.max_bad_fraction."
        )

    def _id(self, row: Row) -> str:
        return f"{self._names[row.shard]}:{row.offset}"


def _noise(seed: int, epoch: int, record: str, piece: int) -> int:
    """64 bits for a piece of a record in an epoch."""
    digest = hashlib.blake2b(f"{seed} {epoch} {piece} {record}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _length_of(array: NDArray[Any]) -> int:
    return len(array) if array.ndim else 1


class RecordReader:
    """The usable records of one source, drawn one by one; read and encoded a part at a time."""

    def __init__(self, sequence: ShardSequence, encoder: Encoder, part: int) -> None:
        """`part`: records that are encoded together."""
        self.sequence = sequence
        self._encoder = encoder
        self._part = part
        self._place: Place | None = None
        self._drawn: deque[Drawn] = deque()
        self._pending: deque[_Pending] = deque()
        self._read_to: Place = (0, 0, 0)
        self._ended = False
        self._empty_epochs = 0

    @property
    def joins(self) -> bool:
        """Whether the task makes its samples of many records."""
        return self._encoder.joins

    def join(self, samples: Sequence[Sample]) -> list[Sample]:
        """See `Encoder.join`."""
        return self._encoder.join(samples)

    @property
    def epochs_differ(self) -> bool:
        """Whether the samples of an epoch are not those of another."""
        return self._encoder.draws_noise

    def seek(self, place: Place) -> None:
        """Draw what stands at `place` next; costs nothing where that is next anyway."""
        if place != self._place:
            self._place = self._read_to = place
            self._drawn.clear()
            self._pending.clear()
            self._ended = False

    def prefetch(self) -> bool:
        """Begin on the next part if nothing else is at hand; whether there was something to begin."""
        idle = not (self._drawn or self._pending or self._ended)
        if idle:
            self._read()
        return idle

    def draw(self) -> Drawn:
        """What comes next. At the end of an epoch: no samples, and the place of the next epoch's beginning.

        Raises DataError where there is nothing, epoch after epoch.
        """
        while not self._drawn:
            if self._pending:
                self._drawn.extend(self._encoder.collect(self._pending.popleft()))
            elif self._ended:
                self._ended = False
                self._drawn.append(Drawn([], self._read_to))
                self._empty_epochs += 1
            else:
                self._read()
        drawn = self._drawn.popleft()
        if drawn.samples:
            self._empty_epochs = 0
        elif self._empty_epochs > _MAX_EMPTY_EPOCHS:
            raise DataError(
                f"No usable record in {_MAX_EMPTY_EPOCHS} passes over a lane's shards: the source is empty, or too many"
                " of its shards are. Remove the empty shards, or lower data.lanes."
            )
        self._place = drawn.after
        return drawn

    def _read(self) -> None:
        """Read a part, and begin to encode it."""
        epoch = self._read_to[0]
        rows, self._read_to = self.sequence.take(self._read_to, self._part)
        self._ended = self._read_to[0] > epoch
        for begin in range(0, len(rows), _CHUNK):
            self._pending.append(self._encoder.submit(rows[begin : begin + _CHUNK]))
