"""Dealers: each advances some of the lanes and deals their rows step by step, in this process or in one of its own."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import multiprocessing.util
import signal
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from trainer import garbage
from trainer.data.lanes import Lane, Position, Row
from trainer.data.reader import Rejected
from trainer.errors import ConfigError, DataError
from trainer.guards.signals import STOP_SIGNALS

if TYPE_CHECKING:
    from trainer.data.corpus import Stream


_STEPS_AHEAD = 2
"""Steps that a worker prepares before they are asked for."""


@dataclass(frozen=True, slots=True)
class Dealt:
    """What a dealer gives to a step: rows by their place in the stream, and the rest as in `StepBatch`."""

    rows: list[tuple[int, Row]]
    epoch: float
    lane_states: dict[int, dict[str, Any]]
    exhausted: bool
    rejected: list[Rejected]
    counts: Mapping[str, int]


class _Told(NamedTuple):
    """Where a reader stands: its state without the place, epochs done, and records rejected or changed by stage."""

    state: Mapping[str, Any]
    epochs: float
    counts: Mapping[str, int]


class Dealer(Protocol):
    """See the module's docstring."""

    def load_lane_states(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        """Go on where the states of a step left off; before the first deal."""

    def deal(self) -> Dealt:
        """The next step's rows. Raises what reading and encoding them raised."""

    def close(self) -> None:
        """End what runs beside this process."""


def make_dealers(stream: Stream, rank: int, world_size: int) -> Sequence[Dealer]:
    """The dealers of a rank, which share its lanes as ranks share all of them.

    Raises ConfigError where lanes do not divide.
    """
    lanes, workers = stream.rules.order.lanes, stream.workers
    parts = world_size * max(1, workers)
    if lanes % parts:
        fitting = ", ".join(str(size) for size in range(1, lanes + 1) if lanes % size == 0)
        each = f" x data.workers={workers}" if workers > 1 else ""
        raise ConfigError(
            f"data.lanes={lanes} does not divide over {world_size} ranks{each}: run on {fitting}"
            f" {'ranks x workers' if each else 'ranks'}, or set data.lanes to a multiple of {parts} (which changes the"
            " order of the samples)."
        )
    if not workers:
        return [LocalDealer(stream, rank, world_size)]
    return [WorkerDealer(stream, rank + world_size * worker, parts) for worker in range(workers)]


class LocalDealer:
    """Deals in this process: the places index, index + count ... of the stream."""

    def __init__(self, stream: Stream, index: int, count: int) -> None:
        order = stream.rules.order
        self._index = index
        self._count = count
        self._global_size = order.global_size
        self._stride = stream.stride
        """Lanes that read for themselves; 1: a single reader for all of them."""
        self._lanes = range(index, order.lanes, count)
        self._readers: dict[int, Lane] = {
            lane: stream.lane(lane) for lane in (self._lanes if self._stride > 1 else [0])
        }
        self._tells = self._stride > 1 or index == 0
        """Whether this dealer tells what its readers rejected; of dealers that read the same, one does."""
        self._place = 0
        """Place in the whole stream where the next step begins, the same for all dealers."""
        self._begun = False
        self._told: dict[int, _Told] = {}
        """Of each reader, as it stands: a step changes those alone that it takes rows from, of thousands maybe."""
        self._counts: Counter[str] = Counter()
        """Those of all readers together."""

    def load_lane_states(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        """See `Dealer`."""
        for index, lane in self._readers.items():
            state = dict(states[index if self._stride > 1 else self._lanes[0]])
            self._place = state.pop("place")
            lane.seek(Position.from_state(state), self._turn(index))

    def deal(self) -> Dealt:
        """See `Dealer`."""
        beginning, self._begun = not self._begun, True
        for lane in self._readers.values() if beginning else ():
            lane.prefetch()
        begin, end = self._place, self._place + self._global_size
        first = begin + (self._index - begin) % self._count
        rows: list[tuple[int, Row]] = []
        asked = {place % self._stride for place in range(first, end, self._count)} if self._stride > 1 else {0}
        for place in range(first, end, self._count):
            lane, turn = self._readers[place % self._stride], place // self._stride
            row = lane.at(turn)
            if not beginning:  # the first step is waited for
                lane.work_ahead(turn)
            if row is not None:
                rows.append((place, row))
        self._place = end
        if self._stride == 1 and self._tells:
            self._readers[0].at(end - 1)  # begin on every block that another dealer has begun on
        for index in self._readers if beginning else asked:
            self._tell(index)
        states = {index: {**told.state, "place": end} for index, told in self._told.items()}
        rejected = [one for index in sorted(asked) for one in self._readers[index].take_rejected()]
        return Dealt(
            rows=rows,
            epoch=sum(told.epochs for told in self._told.values()) / len(self._readers),
            lane_states={index: states[index % self._stride] for index in self._lanes},
            exhausted=not rows and all(lane.at(self._turn(index)) is None for index, lane in self._readers.items()),
            rejected=rejected if self._tells else [],
            counts=+self._counts if self._tells else {},
        )

    def _tell(self, index: int) -> None:
        """Note anew where a reader stands."""
        lane, turn, before = self._readers[index], self._turn(index), self._told.get(index)
        self._told[index] = _Told(lane.state(turn), lane.epochs(turn), lane.counts)
        self._counts.update(lane.counts)
        self._counts.subtract({} if before is None else before.counts)

    def _turn(self, index: int) -> int:
        """The first turn of a reader at or after the place where the next step begins."""
        return -((index - self._place) // self._stride)

    def close(self) -> None:
        """Nothing runs beside this process."""


class WorkerDealer:
    """A LocalDealer in a process of its own, some steps ahead."""

    def __init__(self, stream: Stream, index: int, count: int) -> None:
        """The process starts at the first deal."""
        self._arguments = stream, index, count
        self._states: Mapping[int, Mapping[str, Any]] | None = None
        self._process: multiprocessing.process.BaseProcess | None = None
        self._closed = False
        self._starting = threading.Lock()
        """A run that ends at once closes in one thread what another is about to start."""

    def load_lane_states(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        """See `Dealer`."""
        self._states = dict(states)

    def deal(self) -> Dealt:
        """See `Dealer`. Raises DataError where the process has died or was ended."""
        with self._starting:
            if self._closed:
                raise DataError("data.workers: the worker was ended.")
            if self._process is None:
                self._start()
        try:
            self._connection.send(None)  # one more may be prepared
            dealt = self._connection.recv()
        except (EOFError, OSError) as error:
            assert self._process is not None
            self._process.join(timeout=5)
            raise DataError(
                f"data.workers: process {self._process.pid} has died (exit code {self._process.exitcode};"
                " -9 is the kernel's answer to a lack of memory). Lower data.workers or data.block."
            ) from error
        if isinstance(dealt, BaseException):
            raise dealt
        assert isinstance(dealt, Dealt)
        return dealt

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, *self._arguments, self._states), name="data worker", daemon=True
        )
        # A launcher signals whole groups of processes; when to stop is for the rank to say, which wants its steps yet.
        resource_tracker.ensure_running()  # which the first start would do, and unblock two of them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        self._process.start()  # inherits the mask
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        multiprocessing.util.Finalize(self, self._process.kill, exitpriority=10)  # others are only asked to end
        theirs.close()
        for _ in range(_STEPS_AHEAD):
            self._connection.send(None)

    def close(self) -> None:
        """End the process."""
        with self._starting:
            self._closed = True
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.join(timeout=10)


def _serve(connection: Connection, stream: Stream, index: int, count: int, states: Any) -> None:
    """A worker process: one step for each request, until the other end is gone."""
    logging.getLogger("trainer").setLevel(logging.ERROR)  # the run tells what it opens; what is skipped is in a file
    try:
        dealer = LocalDealer(stream, index, count)
        if states is not None:
            dealer.load_lane_states(states)
        with garbage.collected_between_steps():
            for step in itertools.count(1):
                connection.recv()
                try:
                    answer: Dealt | BaseException = dealer.deal()
                except Exception as error:
                    answer = error
                connection.send(answer)
                garbage.collect(step)
    except (EOFError, OSError, KeyboardInterrupt):
        return
