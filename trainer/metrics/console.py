"""The run as a person watches it: a live view on a terminal, plain lines or JSON anywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Literal, TextIO

from trainer.metrics import RunInfo, StepInfo
from trainer.metrics.json_lines import json_line
from trainer.metrics.live import LiveView
from trainer.metrics.watched import WatchedRun, evaluation_words
from trainer.wording import format_seconds

Mode = Literal["auto", "live", "lines", "json", "quiet"]


_DETAILS = 10
"""Of so many logged steps, plain lines tell one in detail."""


class ConsoleSink:
    """Progress on standard output.

    mode: `live`, a few lines redrawn at each logged step, other output above them; `lines`, a line for each logged
    step, and what the live view shows beside it behind the first and every tenth; `json`, the objects of metrics.jsonl,
    a line each; `quiet`, events and the end alone; `auto`, live on a terminal that can redraw and lines elsewhere.
    NO_COLOR, as everywhere, takes the colours away.
    """

    def __init__(
        self, mode: Mode = "auto", stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`stream`: None for standard output as it is when the run opens; `clock`: seconds."""
        self._mode = mode
        self._stream = stream
        self._clock = clock
        self._live: LiveView | None = None
        self._step = 0

    def open(self, run: RunInfo) -> None:
        """See the contract."""
        self._out = self._stream or sys.stdout
        self._total_steps = run.total_steps
        self._step = run.first_step
        self._watched = WatchedRun(run, self._clock)
        self._lines = 0
        if self._mode == "live" or (self._mode == "auto" and _redraws(self._out)):
            self._live = LiveView(run, self._out, self._clock)

    def log(self, info: StepInfo) -> None:
        """See the contract."""
        self._step = info.step
        if self._live is not None:
            self._live.log(info)
        elif self._mode == "json":
            self._print(json_line(info.row()))
        elif self._mode != "quiet":
            self._watched.log(info)
            width = len(str(self._total_steps))
            self._print(f"step {info.step:>{width}}/{self._total_steps}  {self._described(info)}")
            if self._lines % _DETAILS == 0:
                for row, words in self._watched.rows().items():
                    self._print(f"  {row:<8}  {'  '.join(fact.text for fact in words)}")
            self._lines += 1

    def log_evaluation(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """See the contract."""
        if self._live is not None:
            self._live.log_evaluation(step, metrics)
        elif self._mode == "json":
            self._print(json_line({"step": step, **metrics}))
        elif self._mode != "quiet":
            self._print(f"evaluation at step {step}  {evaluation_words(metrics)}")

    def event(self, step: int, message: str) -> None:
        """See the contract."""
        self._step = step
        if self._live is not None:
            self._live.event(step, message)
        elif self._mode == "json":
            self._print(json_line({"step": step, "event": message}))
        else:
            self._print(f"step {step}: {message}")

    def close(self, status: str) -> None:
        """See the contract."""
        if self._live is not None:
            self._live.close()
            self._live = None
        if self._mode == "json":
            self._print(json_line({"step": self._step, "status": status}))
        else:
            self._print(f"{status} at step {self._step} after {format_seconds(self._watched.elapsed_seconds)}")

    def _print(self, line: str) -> None:
        print(line, file=self._out, flush=True)

    def _described(self, info: StepInfo) -> str:
        """The facts of a step that fit a line, with the time left at the present pace."""
        left = self._watched.left_seconds
        skipped = f"  skipped {info.skipped_steps}" if info.skipped_steps else ""
        return (
            f"loss {info.loss:.4f}  {info.tokens_per_second:,.0f} tokens/s  lr {info.lr:.2e}"
            f"  grad {info.grad_norm:.2f}{skipped}  ETA {'unknown' if left is None else format_seconds(left)}"
        )


def _redraws(stream: TextIO) -> bool:
    """Whether this is a terminal that can move its cursor and show bars."""
    encoding = (getattr(stream, "encoding", None) or "utf-8").lower()
    return stream.isatty() and os.environ.get("TERM") != "dumb" and encoding.startswith("utf")
