"""What a run remembers from step to step, apart from weights and data positions. Frozen: every step makes the next
one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class TrainState:
    """Totals since the first step of the run, over all ranks and restarts.

    step: optimizer steps done; tokens: target tokens; samples; epoch: passes over the data, fractional; seconds: wall
    time spent training; best: the best value of the headline metric so far and the step that reached it;
    stale_evaluations: how many evaluations ago that was; losses, grad_norms: of late, without anomalies;
    anomalies: steps of late that had one (see `trainer.guards.anomalies`); lowest_scale_steps: how many in a row fp16's
    loss scale has been at its lowest.
    """

    step: int = 0
    tokens: int = 0
    samples: int = 0
    epoch: float = 0.0
    seconds: float = 0.0
    best: float | None = None
    best_step: int | None = None
    stale_evaluations: int = 0
    losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()
    anomalies: tuple[int, ...] = ()
    lowest_scale_steps: int = 0

    def advance(self, tokens: int, samples: int, epoch: float, seconds: float) -> TrainState:
        """The state after one more optimizer step."""
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + tokens,
            samples=self.samples + samples,
            epoch=epoch,
            seconds=self.seconds + seconds,
        )

    def evaluated(self, value: float, direction: str) -> TrainState:
        """The state after an evaluation whose headline metric was `value`; direction: "min" or "max"."""
        if self.best is None or (value < self.best if direction == "min" else value > self.best):
            return replace(self, best=value, best_step=self.step, stale_evaluations=0)
        return replace(self, stale_evaluations=self.stale_evaluations + 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainState:
        """The state that `to_dict` wrote; keys it does not know are left aside."""
        known = {field.name for field in fields(cls)}
        frozen: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key in known
        }
        return cls(**frozen)
