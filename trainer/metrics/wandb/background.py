"""A thread that does one thing after the other, so that a step never waits for a server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

MOST_WAITING = 100_000
"""Things that may wait; more means that W&B's own process takes nothing any more."""


class Background:
    """Does what it is given, in order. What raises ends it, and the next call of `do` raises the same."""

    def __init__(self, name: str) -> None:
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def do(self, action: Callable[[], None]) -> None:
        """Have it done soon. Raises what an earlier action has raised, RuntimeError where too many wait."""
        if self._failure is not None:
            raise self._failure
        if self._waiting.qsize() >= MOST_WAITING:
            raise RuntimeError(f"{MOST_WAITING} rows wait to be taken")
        self._waiting.put(action)

    def close(self, seconds: float) -> bool:
        """Have all done; whether it was within so many seconds. Raises what an action has raised."""
        self._waiting.put(None)
        self._thread.join(seconds)
        if self._failure is not None:
            raise self._failure
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (action := self._waiting.get()) is not None:
            try:
                action()
            except Exception as error:  # told where the next thing is asked for
                self._failure = error
                self._drop()
                return

    def _drop(self) -> None:
        while True:
            try:
                self._waiting.get_nowait()
            except Empty:
                return
