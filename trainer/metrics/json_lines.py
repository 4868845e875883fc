"""A file of one JSON object a line that stays true over crashes and resumes."""

from __future__ import annotations

import errno
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)


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


def truncate_after(path: Path, last_step: float) -> None:
    """Cut the file before its first line that belongs to a step after `last_step` or is not a whole JSON object."""
    with path.open("r+b") as file:
        end = 0
        for line in file:
            if not line.endswith(b"\n") or _step_of(line) > last_step:
                break
            end += len(line)
        file.truncate(end)


def _step_of(line: bytes) -> float:
    """The step of a line; infinity if it has none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
