"""Workers deal what a thread would deal, end with the loader, and a dead one is told."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from multiprocessing import resource_tracker
from typing import Any

import psutil
import pytest

from tests.data.fakes import LengthTask, MemorySource, loader_of, memory_data, merged, saved, steps_of
from trainer.data.loader import StepBatch
from trainer.errors import ConfigError, DataError
from trainer.tasks import BadRecord, Encoded, Record


class Burst(LengthTask):
    """Fails at the first record of 9 positions."""

    def encode(self, records: Sequence[Record]) -> list[Encoded | BadRecord]:
        if any(record["length"] == 9 for record in records):
            raise RuntimeError("the task broke")
        return super().encode(records)


def data_with(workers: int, sizes: Sequence[int] = (30,) * 30, **options: Any) -> Any:
    return memory_data(MemorySource(sizes), lanes=24, block=8, workers=workers, **options)


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.parametrize("batching", ["bucketed", "packed"])
@pytest.mark.parametrize("sizes", [(30,) * 30, (900,)])
def test_workers_change_nothing_before_and_after_a_resume(sizes: tuple[int, ...], batching: str) -> None:
    whole = steps_of(data_with(0, sizes, batching=batching), 8)
    first = steps_of(data_with(3, sizes, batching=batching), 5)
    rest = steps_of(data_with(2, sizes, batching=batching), 3, world_size=2, states=saved(first))
    assert merged(first) == merged(whole)[:5]
    ids = [sorted(id for step in steps for id in step.ids) for steps in zip(*rest, strict=True)]
    assert ids == [sorted(step) for step in merged(whole)[5:]]
    assert not children()


def test_a_step_of_few_of_the_lanes_tells_of_all() -> None:
    """As a loader that resumes there, and asks all; and as ranks together."""
    bad = frozenset((shard, 3) for shard in range(0, 24, 2))

    def steps(count: int, world_size: int = 1, states: Any = None) -> list[list[StepBatch]]:
        data = memory_data(MemorySource((30,) * 24, bad), lanes=24, block=8, max_bad_fraction=1.0)
        return steps_of(data, count, world_size, states, global_size=6)

    (whole,), ranks = steps(9), steps(9, world_size=2)
    for one, two, other in zip(whole, *ranks, strict=True):
        assert one.lane_states == two.lane_states | other.lane_states
        assert one.epoch == pytest.approx((two.epoch + other.epoch) / 2)
        assert Counter(one.counts) == Counter(two.counts) + Counter(other.counts)
        assert {*one.rejected} == {*two.rejected, *other.rejected}
    for place in range(1, 9):
        ((resumed,),) = steps(1, states=saved([whole[:place]]))
        assert resumed.lane_states == whole[place].lane_states
        assert whole[place].counts.get("bad_record", 0) >= resumed.counts.get("bad_record", 0) > 0


def test_what_breaks_in_a_worker_is_told() -> None:
    loader = loader_of(data_with(2), Burst())
    (failure,) = (step.failure for step in islice(loader, 1))
    loader.close()
    assert isinstance(failure, RuntimeError) and "the task broke" in str(failure)


def test_a_loader_closed_while_its_workers_start_leaves_none() -> None:
    """As by a run that was finished already."""
    for _ in range(5):
        loader = loader_of(data_with(2))
        iter(loader)
        loader.close()
        assert not children()


def test_a_worker_that_dies_is_named() -> None:
    loader = loader_of(data_with(1))
    steps = iter(loader)
    next(steps)
    (worker,) = children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=rf"process {worker.pid} has died \(exit code -9"):
        list(steps)
    loader.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_leaves_it_to_its_rank_when_to_stop(number: signal.Signals) -> None:
    """Launchers signal whole groups of processes, from the first moment on."""
    whole = [step.ids for step in steps_of(data_with(0), 6)[0]]
    resource_tracker._resource_tracker._stop()  # as in a process that starts its first worker
    loader = loader_of(data_with(1))
    steps = iter(loader)
    ids = [next(steps).ids]
    (worker,) = children()
    for _ in range(5):
        worker.send_signal(number)
        ids.append(next(steps).ids)
    loader.close()
    assert ids == whole and not children()


def test_lanes_that_do_not_divide_over_workers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.lanes=24 does not divide over 1 ranks x data.workers=5: run on 1, 2,"):
        loader_of(data_with(5))
