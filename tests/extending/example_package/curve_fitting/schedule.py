"""A schedule: the learning rate goes down in stairs."""

from __future__ import annotations

from typing import Literal


class Stairs:
    """`drop` to the power of the stairs already passed, of `stairs` equal ones over the run."""

    unit: Literal["steps", "tokens"] = "steps"

    def __init__(self, total: float, stairs: int = 4, drop: float = 0.5) -> None:
        self._total, self._stairs, self._drop = total, stairs, drop

    def factor(self, progress: float) -> float:
        """The multiplier of `optimizer.lr` for the step that begins at `progress`."""
        return self._drop ** int(self._stairs * min(progress / self._total, 1.0))
