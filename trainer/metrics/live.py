"""What a terminal shows of a run while it goes on: a few lines that are redrawn in place. The only importer of rich."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from trainer.metrics import RunInfo, StepInfo
from trainer.metrics.watched import WatchedRun, Words, evaluation_words
from trainer.wording import format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_EVENTS = 5
"""Newest events that stay in view."""

_REDRAW_SECONDS = 0.1
"""Of steps that are logged faster, a person sees the newest."""

_LABEL, _LOSS_SPARKS, _RATE_SPARKS, _BAR, _NARROWEST = 10, 48, 16, 40, 8
"""Columns."""


class LiveView:
    """Progress, time left, the loss and its history, speed beside the prediction, the update, health of the data,
    memory, the newest evaluation and events; what deserves a look is coloured.

    It is redrawn when something is logged, never in between: no thread of its own, nothing to wait for.
    """

    def __init__(self, run: RunInfo, stream: TextIO, clock: Callable[[], float]) -> None:
        """Takes the terminal until `close`. clock: seconds."""
        from rich.console import Console
        from rich.live import Live

        self._run = run
        self._watched = WatchedRun(run, clock)
        self._clock = clock
        self._drawn_at = -math.inf
        self._evaluation = ""
        self._events: deque[str] = deque(maxlen=_EVENTS)
        self._console = Console(file=stream)
        self._live = Live(self.render(), console=self._console, auto_refresh=False, vertical_overflow="crop")
        self._live.start()

    def log(self, info: StepInfo) -> None:
        """The facts of a step."""
        self._watched.log(info)
        if self._clock() - self._drawn_at >= _REDRAW_SECONDS:
            self._draw()

    def log_evaluation(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """The newest evaluation, in the place of the one before."""
        self._evaluation = f"step {step:,}  {evaluation_words(metrics)}"
        self._draw()

    def event(self, step: int, message: str) -> None:
        """Something that happened; the oldest makes room."""
        self._events.append(f"step {step:,}: {message}")
        self._draw()

    def close(self) -> None:
        """Leave what is in view as it is, and give the terminal back."""
        self._draw()
        self._live.stop()

    def _draw(self) -> None:
        self._drawn_at = self._clock()
        self._live.update(self.render(), refresh=True)

    def render(self) -> RenderableType:
        """The view as it stands."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        rows = Table.grid(padding=(0, 1))
        rows.add_column(style="dim", min_width=_LABEL, no_wrap=True)
        rows.add_column(no_wrap=True, overflow="ellipsis")
        watched, room = self._watched, max(_NARROWEST, self._console.width - _LABEL - 1)
        if watched.info is not None:
            loss = f"{watched.info.loss:.4f}"
            sparks = watched.losses.sparkline(min(_LOSS_SPARKS, room - len(loss) - 2))
            rows.add_row("loss", Text.assemble((loss, "bold"), "  ", (sparks, "cyan")))
            for row, words in watched.rows().items():
                history = Words(watched.rates.sparkline(_RATE_SPARKS)) if row == "speed" else None
                rows.add_row(row, _joined(words, room, history))
        if self._evaluation:
            rows.add_row("evaluation", _joined([Words(part) for part in self._evaluation.split("  ")], room))
        for number, event in enumerate(self._events):
            rows.add_row("" if number else "events", Text(event, overflow="ellipsis", no_wrap=True))
        return Group(self._head(), rows)

    def _head(self) -> RenderableType:
        """Name, steps, a bar as far as there is room, and the time."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        watched, run = self._watched, self._run
        step = run.first_step if watched.info is None else watched.info.step
        left = watched.left_seconds
        words = [
            run.name,
            f"step {step:,}/{run.total_steps:,}",
            f"{100 * watched.share:.0f} %",
            f"{format_seconds(watched.elapsed_seconds)} gone",
            "ETA unknown" if left is None else f"ETA {format_seconds(left)}",
        ]
        room = self._console.width - sum(len(word) + 2 for word in words) - 1
        if room < _NARROWEST:
            return _joined([Words(word) for word in words], self._console.width)
        head = Table.grid(padding=(0, 2))
        texts = [Text(word, style) for word, style in zip(words, ("bold", "", "", "dim", "bold green"), strict=True)]
        head.add_row(*texts[:2], ProgressBar(completed=100 * watched.share, width=min(_BAR, room)), *texts[2:])
        return head


def _joined(facts: Sequence[Words], room: int, history: Words | None = None) -> Text:
    """Facts beside each other, in as many lines as they need; history: a sparkline behind the first, if it fits."""
    from rich.text import Text

    if history is not None and sum(len(one.text) + 2 for one in (*facts, history)) <= room:
        facts = [facts[0], history, *facts[1:]]
    text, column = Text(), 0
    for fact in facts:
        if column and column + 2 + len(fact.text) > room:
            text.append("\n")
            column = 0
        elif column:
            text.append("  ")
            column += 2
        text.append(fact.text, style="yellow" if fact.alarm else "cyan" if fact is history else "")
        column += len(fact.text)
    return text
