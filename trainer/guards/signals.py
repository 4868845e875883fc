"""Signals become a flag that the loop reads between steps; every rank agrees on it before one coordinated save."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PREEMPTED = 75  # EX_TEMPFAIL: try again

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """`name`: the first signal that asked for a stop, or None."""

    name: str | None = None


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Turn the signals into a request; a second one leaves at once with the shell's 128 + number. Restores the old
    handlers."""
    request = StopRequest()

    def on_signal(number: int, _: FrameType | None) -> None:
        if request.name is not None:
            raise SystemExit(128 + number)
        request.name = signal.Signals(number).name

    previous = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
