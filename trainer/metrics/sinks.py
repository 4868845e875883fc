"""`metrics.jsonl`, the truth of a run, and the guard that keeps any sink from stopping the training."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.metrics import RunInfo, Sink, StepInfo
from trainer.metrics.json_lines import JsonLines

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

    def alarm(self, step: int, message: str) -> None:
        """See the contract."""
        self._each("alarm", lambda sink: getattr(sink, "alarm", sink.event)(step, message))

    def saved(self, step: int, checkpoint: Path) -> None:
        """See the contract."""
        self._each("saved", lambda sink: getattr(sink, "saved", lambda *_: None)(step, checkpoint))

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
    """`metrics.jsonl`: logged steps, evaluations (`eval/...`) and events."""

    def __init__(self, path: Path | None = None) -> None:
        """`path`: None for metrics.jsonl in the run directory."""
        self._path = path
        self._lines: JsonLines | None = None

    def open(self, run: RunInfo) -> None:
        """See the contract."""
        self._lines = JsonLines(self._path or run.directory / METRICS_FILE, run.first_step)

    def log(self, info: StepInfo) -> None:
        """See the contract."""
        self._write(info.row())

    def log_evaluation(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """See the contract."""
        self._write({"step": step, **metrics})

    def event(self, step: int, message: str) -> None:
        """See the contract."""
        self._write({"step": step, "event": message})

    def close(self, status: str) -> None:
        """See the contract."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def _write(self, row: Mapping[str, Any]) -> None:
        assert self._lines is not None, "open comes first"
        self._lines.write(row)
