"""The run as a person watches it: one live line on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TextIO

from trainer.metrics import RunInfo, StepInfo
from trainer.wording import amount

if TYPE_CHECKING:
    from rich.progress import Progress


class ConsoleSink:
    """Progress on standard output. On a terminal a bar is redrawn at each logged step; other output goes above it."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """`stream`: None for standard output as it is when the run opens; `clock`: seconds."""
        self._stream = stream
        self._clock = clock
        self._progress: Progress | None = None
        self._step = 0

    def open(self, run: RunInfo) -> None:
        """See the contract."""
        self._out = self._stream or sys.stdout
        self._total_steps = run.total_steps
        self._predicted_bytes = run.plan.get("predicted_memory_bytes")
        self._step = run.first_step
        self._opened_at = self._clock()
        if self._out.isatty():
            self._progress = _start_progress(self._out)
            self._task_id = self._progress.add_task("", total=run.total_steps, completed=run.first_step, facts="")

    def log(self, info: StepInfo) -> None:
        """See the contract."""
        self._step = info.step
        facts = describe_step(info, self._total_steps, self._predicted_bytes)
        if self._progress is not None:
            self._progress.update(self._task_id, completed=info.step, facts=facts, refresh=True)
        else:
            self._print(f"step {info.step:>{len(str(self._total_steps))}}/{self._total_steps}  {facts}")

    def log_evaluation(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """See the contract."""
        figures = "  ".join(f"{name.removeprefix('eval/')} {_short(value)}" for name, value in metrics.items())
        self._print(f"evaluation at step {step}  {figures}")

    def event(self, step: int, message: str) -> None:
        """See the contract."""
        self._step = step
        self._print(f"step {step}: {message}")

    def close(self, status: str) -> None:
        """See the contract."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._print(f"{status} at step {self._step} after {format_seconds(self._clock() - self._opened_at)}")

    def _print(self, line: str) -> None:
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._out, flush=True)


def describe_step(info: StepInfo, total_steps: int, predicted_bytes: float | None = None) -> str:
    """The facts of a step that fit a line, with the time left at the present pace, and where it was predicted, the
    memory."""
    left = format_seconds(info.step_seconds * max(0, total_steps - info.step))
    memory = ""
    if predicted_bytes is not None:
        memory = f"  memory {amount(info.memory_bytes)} (predicted {amount(predicted_bytes)})"
    skipped = f"  skipped {info.skipped_steps}" if info.skipped_steps else ""
    return (
        f"loss {info.loss:.4f}  {info.tokens_per_second:,.0f} tokens/s  lr {info.lr:.2e}"
        f"  grad {info.grad_norm:.2f}{skipped}{memory}  ETA {left}"
    )


def format_seconds(seconds: float) -> str:
    """4:05 or 1:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _short(value: float | str) -> str:
    """Four significant digits, and no exponent for what fits a line without."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _start_progress(stream: TextIO) -> Progress:
    """A bar without a refresh thread of its own: it is redrawn when a step is logged, never in between."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.fields[facts]}"))
    progress = Progress(*columns, console=Console(file=stream), auto_refresh=False)
    progress.start()
    return progress
