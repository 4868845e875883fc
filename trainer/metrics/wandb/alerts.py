"""What a person should be told of a run, and not too often; and whether the run stands still."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.guards.heartbeats import Heartbeat, read_heartbeats, who_is_late

KINDS = ("stall", "alarm", "failure", "finish")
"""stall: the run stands still; alarm: a spike, a rollback, a checkpoint that was not written; failure: it ends so;
finish: it ends otherwise."""

_TITLES = {"stall": "Stall", "alarm": "Alarm", "failure": "Run failed", "finish": "Run ended"}
_LEVELS = {"stall": "ERROR", "alarm": "WARN", "failure": "ERROR", "finish": "INFO"}
_LONGER = 4
"""Sections of a run that may take so many times as long as others, for the watchdog, too."""
_LONG = ("evaluate", "commit", "save", "rollback", "start-up")
_SILENCE_SECONDS = 60.0


class Alerts:
    """Sends alerts of the kinds that are wanted, each at most once in `seconds`; what came in between is counted in the
    next."""

    def __init__(
        self,
        kinds: tuple[str, ...],
        seconds: float,
        send: Callable[[str, str, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """send: gets title, text and level (INFO, WARN, ERROR)."""
        self._kinds, self._seconds, self._send, self._clock = kinds, seconds, send, clock
        self._sent: dict[str, float] = {}
        self._held: dict[str, int] = {}

    def tell(self, kind: str, text: str) -> None:
        """An alert, unless it is not wanted or comes too soon after another of its kind."""
        if kind not in self._kinds:
            return
        now = self._clock()
        if kind in self._sent and now - self._sent[kind] < self._seconds:
            self._held[kind] = self._held.get(kind, 0) + 1
            return
        self._sent[kind] = now
        held = self._held.pop(kind, 0)
        self._send(_TITLES[kind], f"{text} ({held} more since the last)" if held else text, _LEVELS[kind])


class Stall:
    """Whether the run stands still, by the signs of life of its ranks (`heartbeats/`)."""

    def __init__(self, folder: Path, world_size: int, seconds: float, now: Callable[[], float] = time.time) -> None:
        """seconds: in one part of a step (evaluating, saving and starting may take four times as long)."""
        self._folder, self._world_size, self._seconds, self._now = folder, world_size, seconds, now
        self._began = now()
        self._told: tuple[int | None, str] | None = None

    def look(self) -> str | None:
        """Who is late, and where; once for each place. None where the run goes on."""
        try:
            own = Heartbeat(**json.loads((self._folder / "rank_00000.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        place, now = (own.step, own.section), self._now()
        limit = self._seconds * (_LONGER if own.section in _LONG or own.step is None else 1)
        if own.beat < self._began or own.ended or now - own.since <= limit or place == self._told:
            return None
        self._told = place
        beats = read_heartbeats(self._folder, self._world_size, self._began)
        return who_is_late(beats, self._world_size, now, _SILENCE_SECONDS)


def read_reason(directory: Path) -> str:
    """Why the run has ended, as status.json says; "" where it says nothing."""
    try:
        status: dict[str, Any] = json.loads((directory / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return f"step {status.get('step', 0)}: {status.get('reason', '')}"
