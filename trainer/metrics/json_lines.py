"""A file of one JSON object a line that stays true over crashes and resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends objects that have a `step`; each line is on its way to the disk before `write` returns.

    On opening, lines of steps after `last_step` and a line cut off by a crash are taken away, so that no step stands
    twice. Numbers that are not finite become null: every line is valid JSON.
    """

    def __init__(self, path: Path, last_step: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            truncate_after(path, last_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one object."""
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._file.write(json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; nothing may be written afterwards."""
        self._file.close()


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
