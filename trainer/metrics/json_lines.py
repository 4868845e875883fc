"""A file of one JSON object a line that stays true over crashes and resumes."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from bisect import bisect_left
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)

_EVENT = b'"event"'


def json_line(row: Mapping[str, Any]) -> str:
    """An object as one line; numbers that are not finite become null, so that it is valid JSON."""
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False)


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _finite(v) if isinstance(v, Mapping) else None if isinstance(v, float) and not math.isfinite(v) else v
        for key, v in row.items()
    }


class JsonLines:
    """Appends objects that have a `step`; each line is on its way to the disk before `write` returns, unless the disk
    is full: then it waits in memory for a later `write` or `close` to find room.

    On opening, lines of steps after `last_step` and a line cut off by a crash are taken away, so that no step stands
    twice. Numbers that are not finite become null: every line is valid JSON.
    """

    def __init__(self, path: Path, last_step: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            truncate_after(path, last_step)
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._told = False

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one object. Raises OSError where the disk fails for another reason than a lack of room."""
        self._waiting += (json_line(row) + "\n").encode()
        self._flush()

    def close(self) -> None:
        """Close the file; nothing may be written afterwards."""
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        """Write what waits, as far as there is room; a lack of it is told once."""
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if error.errno not in _FULL:
                raise
            if not self._told:
                _log.warning("%s: %s. Its lines wait in memory until there is room.", self._file.name, error.strerror)
            self._told = True


def truncate_after(path: Path, last_step: float, step_of: Callable[[bytes], float] | None = None) -> None:
    """Cut the file before its first line that belongs to a step after `last_step` or is not whole.

    step_of: the step of a line, infinity if it is damaged; None: of a JSON object. From line to line the step never
    falls, but for events, which may tell of an earlier one; so the place is looked for by halving, and a file of a
    million lines takes no longer than a short one.
    """
    step_of = step_of or _step_of

    def is_beyond(line: bytes) -> bool:
        return not line.endswith(b"\n") or step_of(line) > last_step

    with path.open("r+b") as file:

        def beyond(offset: int) -> bool:
            """Whether the first line from `offset` on that is no event has to go."""
            file.seek(max(offset - 1, 0))
            if offset > 0:
                file.readline()  # the rest of the line before
            return next((is_beyond(line) for line in file if _EVENT not in line), True)

        first = bisect_left(range(file.seek(0, os.SEEK_END)), True, key=beyond)
        end = file.seek(max(first - 1, 0))  # where the last line begins that stays and is no event
        for line in file:
            if is_beyond(line):
                break
            end += len(line)
        file.truncate(end)


def _step_of(line: bytes) -> float:
    """The step of a line; infinity if it has none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
