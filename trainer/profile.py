"""Where the time of a step goes: a few steps recorded as a Chrome trace and as a table whose rows sum to the step.

`debug=profile` switches it on. Open the trace in chrome://tracing or https://ui.perfetto.dev. On a GPU the history of
its memory is kept too (a pickle for https://pytorch.org/memory_viz).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from trainer import sections
from trainer.config import DebugConfig

_log = logging.getLogger(__name__)

_STACKS = 100_000
"""Allocations whose history is kept on a GPU."""


@contextmanager
def recorded(debug: DebugConfig, folder: Path, rank: int) -> Iterator[None]:
    """While it lasts, the steps that `debug` names are recorded and, at their end, written to `folder`."""
    if debug.profile_steps == 0:
        yield
        return
    recording = _Recording(debug.profile_after, debug.profile_steps, folder, rank)
    with sections.told_to(recording.hear):
        yield
    recording.close()


class _Recording:
    """Hears of sections; a step goes from its section `data` to that of the next."""

    def __init__(self, after: int, count: int, folder: Path, rank: int) -> None:
        self._first, self._last = after + 1, after + count
        self._folder, self._rank = folder, rank
        self._begun = 0
        """Steps of this start that have begun."""
        self._seconds: dict[str, float] = {}
        self._section: tuple[str, float] | None = None
        self._range: record_function | None = None
        self._profiler: profile | None = None

    def hear(self, name: str, step: int | None) -> None:
        """A section begins: the one before has ended, and with `data` the step before."""
        now = time.perf_counter()
        if name == "data":
            self._begun += 1
        if self._profiler is not None:
            self._end_section(now)
            if self._begun > self._last:
                self._write(self._last - self._first + 1)
        if name == "data" and self._begun == self._first:
            self._start()
            now = time.perf_counter()
        if self._profiler is not None:
            self._section = name, now
            self._range = record_function(f"section: {name}")
            self._range.__enter__()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """The run is over, perhaps before all steps were recorded."""
        if self._profiler is not None:
            self._end_section(time.perf_counter())
            self._write(self._begun - self._first + 1)
        elif self._begun < self._first:
            _log.warning(
                "nothing was recorded: %d steps were taken, debug.profile_after=%d", self._begun, self._first - 1
            )

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_STACKS)
        self._profiler = profile(activities=activities, record_shapes=True)
        self._profiler.start()

    def _end_section(self, now: float) -> None:
        assert self._section is not None and self._range is not None, "a section runs while the profiler does"
        name, since = self._section
        self._seconds[name] = self._seconds.get(name, 0.0) + now - since
        self._range.__exit__(None, None, None)

    def _write(self, steps: int) -> None:
        """Trace, table and, on a GPU, memory; recording ends."""
        assert self._profiler is not None, "something was recorded"
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._folder / f"trace_rank_{self._rank:05d}.json"))
        rows = {name: seconds / steps for name, seconds in self._seconds.items()}
        facts = {"rank": self._rank, "steps": steps, "step_seconds": sum(rows.values()), "sections": rows}
        path = self._folder / f"sections_rank_{self._rank:05d}.json"
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if torch.cuda.is_available():
            snapshot = str(self._folder / f"memory_rank_{self._rank:05d}.pickle")
            torch.cuda.memory._dump_snapshot(snapshot)  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
        if self._rank == 0:
            print(table(rows), f"trace in {self._folder}", sep="\n", flush=True)


def table(rows: dict[str, float]) -> str:
    """Sections in the order in which they came, their seconds a step and shares, and the sum, which is the step."""
    total = sum(rows.values())
    lines = [f"{name:<10} {1000 * seconds:10.2f} ms {100 * seconds / total:6.1f} %" for name, seconds in rows.items()]
    return "\n".join(["a step, by its sections", *lines, f"{'step':<10} {1000 * total:10.2f} ms  100.0 %"])
