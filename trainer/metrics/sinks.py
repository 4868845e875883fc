"""`metrics.jsonl`, the truth of a run, and the guard that keeps any sink from stopping the training."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from trainer.metrics import RunInfo, Sink, StepInfo

METRICS_FILE = "metrics.jsonl"


class SafeSinks:
    """Hands every call to all sinks. A sink that raises is reported once, by name, and switched off."""

    def __init__(self, sinks: Sequence[Sink], report: Callable[[str], None] | None = None) -> None:
        """`report`: where the warning goes; None: standard error."""
        self._sinks = list(sinks)
        self._report = report or (lambda message: print(message, file=sys.stderr, flush=True))

    def open(self, run: RunInfo) -> None:
        """See the contract."""
        self._each("open", lambda sink: sink.open(run))

    def log(self, info: StepInfo) -> None:
        """See the contract."""
        self._each("log", lambda sink: sink.log(info))

    def log_evaluation(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """See the contract."""
        self._each("log_evaluation", lambda sink: sink.log_evaluation(step, metrics))

    def event(self, step: int, message: str) -> None:
        """See the contract."""
        self._each("event", lambda sink: sink.event(step, message))

    def close(self, status: str) -> None:
        """See the contract; nothing may be logged afterwards."""
        self._each("close", lambda sink: sink.close(status))
        self._sinks = []

    def _each(self, method: str, call: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:  # whatever it is, training goes on
                self._sinks.remove(sink)
                name = type(sink).__name__
                self._report(f"warning: {name} failed in {method} and is now off, training goes on: {_describe(error)}")
                if method not in ("open", "close"):
                    with suppress(Exception):  # already reported; it may still give back the terminal or a file
                        sink.close("failed")


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class JsonLinesSink:
    """One JSON object a line: logged steps, evaluations (`eval/...`) and events, flushed line by line.

    On resuming, lines of steps after the one resumed from, and a line cut off by a crash, are taken away first, so that
    no step stands twice. Numbers that are not finite become null: every line is valid JSON.
    """

    def __init__(self, path: Path | None = None) -> None:
        """`path`: None for metrics.jsonl in the run directory."""
        self._path = path
        self._file: IO[str] | None = None

    def open(self, run: RunInfo) -> None:
        """See the contract."""
        path = self._path or run.directory / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _truncate_after(path, run.first_step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, info: StepInfo) -> None:
        """See the contract."""
        self._write(asdict(info))

    def log_evaluation(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """See the contract."""
        self._write({"step": step, **metrics})

    def event(self, step: int, message: str) -> None:
        """See the contract."""
        self._write({"step": step, "event": message})

    def close(self, status: str) -> None:
        """See the contract."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self._file is not None, "open comes first"
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        self._file.write(json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()


def _truncate_after(path: Path, last_step: int) -> None:
    """Cut the file before its first line that belongs to a step after `last_step` or is not a whole JSON object."""
    with path.open("r+b") as file:
        end = 0
        for line in file:
            if not line.endswith(b"\n") or _step_of(line) > last_step:
                break
            end += len(line)
        file.truncate(end)


def _step_of(line: bytes) -> float:
    """The step of a line; infinity if it has none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
