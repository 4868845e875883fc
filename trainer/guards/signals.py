"""Signals become a flag that the loop reads between steps; every rank agrees on it before one coordinated save."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PREEMPTED = 75  # EX_TEMPFAIL: try again

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


ONE_REQUEST_SECONDS = 3.0
"""Signals that follow the first one so soon are the same request: Slurm signals every process of a step, and the batch
script and torchrun, which it signals too, pass theirs on."""


class StopRequest:
    """`name`: the first signal that asked for a stop, or None; `wish`: what else did, for a job that shall not go on by
    itself."""

    name: str | None = None
    wish: str | None = None

    def ask(self, wish: str) -> None:
        """Somebody wants the run to end, for this reason; from any thread."""
        self.wish = self.wish or wish


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Turn the signals into a request; a second one, later than ONE_REQUEST_SECONDS, leaves at once with the shell's
    128 + number. Restores the old handlers."""
    request = StopRequest()
    requested_at = 0.0

    def on_signal(number: int, _: FrameType | None) -> None:
        nonlocal requested_at
        if request.name is None:
            request.name, requested_at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - requested_at > ONE_REQUEST_SECONDS:
            raise SystemExit(128 + number)

    previous = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
