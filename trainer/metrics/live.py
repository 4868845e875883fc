"""What a terminal shows of a run while it goes on: a few lines that are redrawn in place. The only importer of rich."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TextIO

from trainer.metrics import RunInfo, StepInfo
from trainer.wording import amount, format_seconds, short_number

if TYPE_CHECKING:
    from rich.console import RenderableType

_EVENTS = 5
"""Newest events that stay in view."""

_BARS = "▁▂▃▄▅▆▇█"
_SPARKS = 48
"""Columns of the sparkline."""


class LiveView:
    """Progress, time left, a sparkline of the loss, speed and its parts, health of the data, the newest events.

    It is redrawn when something is logged, never in between: no thread of its own, nothing to wait for.
    """

    def __init__(self, run: RunInfo, stream: TextIO) -> None:
        """Takes the terminal until `close`."""
        from rich.console import Console
        from rich.live import Live

        self._run = run
        self._losses: list[float] = []
        self._info: StepInfo | None = None
        self._evaluation = ""
        self._events: deque[str] = deque(maxlen=_EVENTS)
        self._live = Live(self.render(), console=Console(file=stream), auto_refresh=False)
        self._live.start()

    def log(self, info: StepInfo) -> None:
        """The facts of a step."""
        self._info = info
        self._losses.append(info.loss)
        self._live.update(self.render(), refresh=True)

    def log_evaluation(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """The newest evaluation, in the place of the one before."""
        figures = [f"{name.removeprefix('eval/')} {short_number(value)}" for name, value in metrics.items()]
        self._evaluation = f"step {step:,}  {'  '.join(figures)}"
        self._live.update(self.render(), refresh=True)

    def event(self, step: int, message: str) -> None:
        """Something that happened; the oldest makes room."""
        self._events.append(f"step {step:,}: {message}")
        self._live.update(self.render(), refresh=True)

    def close(self) -> None:
        """Leave what is in view as it is, and give the terminal back."""
        self._live.stop()

    def render(self) -> RenderableType:
        """The view as it stands."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        info, run = self._info, self._run
        step, total = (info.step if info else run.first_step), run.total_steps
        head = Table.grid(padding=(0, 2))
        left = format_seconds(info.step_seconds * max(0, total - step)) if info else "unknown"
        share = f"{100 * step / total:.0f} %" if total else ""
        head.add_row(
            Text(run.name, style="bold"),
            f"step {step:,}/{total:,}",
            ProgressBar(total=max(total, 1), completed=step, width=24),
            share,
            f"ETA {left}",
        )
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim")
        if info is not None:
            rows.add_row("loss", f"{info.loss:.4f}  {sparkline(self._losses, _SPARKS)}")
            rows.add_row("speed", "  ".join(_speed(info)))
            rows.add_row("update", f"lr {info.lr:.2e}  grad {info.grad_norm:.2f}{_skipped(info)}")
            rows.add_row("data", "  ".join(_data(info)))
            predicted = run.plan.get("predicted_memory_bytes")
            beside = "" if predicted is None else f", predicted {amount(predicted)}"
            rows.add_row("memory", f"{amount(info.memory_bytes)} at the peak of the largest rank{beside}")
        if self._evaluation:
            rows.add_row("evaluation", self._evaluation)
        for number, event in enumerate(self._events):
            rows.add_row("" if number else "events", Text(event, overflow="ellipsis", no_wrap=True))
        return Group(head, rows)


def sparkline(values: Sequence[float], width: int) -> str:
    """The whole history in at most `width` characters: the mean of each stretch, between the lowest and the highest."""
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if not finite:
        return ""
    stretches = min(width, len(finite))
    edges = [len(finite) * place // stretches for place in range(stretches + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def _speed(info: StepInfo) -> list[str]:
    waiting = info.loader_wait_seconds / info.step_seconds if info.step_seconds else 0.0
    mfu = [] if info.mfu is None else [f"MFU {100 * info.mfu:.1f} %"]
    rate = f"{info.tokens_per_second:,.0f} target tokens/s"
    return [rate, f"{info.step_seconds:.3g} s a step", *mfu, f"{100 * waiting:.0f} % waiting for data"]


def _skipped(info: StepInfo) -> str:
    return f"  skipped {info.skipped_steps}" if info.skipped_steps else ""


def _data(info: StepInfo) -> list[str]:
    unused = [f"{name} {count:,}" for name, count in info.data.items() if count]
    return [
        f"epoch {info.epoch:.2f}",
        f"{info.tokens:,} tokens",
        f"padding {100 * info.padding_fraction:.1f} %",
        *unused,
    ]
