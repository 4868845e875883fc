"""Learning-rate schedules: pure functions of progress. No state, so nothing to save and nothing to run too fast.

A schedule maps progress to a factor of `optimizer.lr`. Progress counts optimizer steps (never micro-batches or
ranks), or tokens with `unit=tokens`; `warmup` and `total` are in that unit. `total` is given by the trainer: the
run's `steps`, or `stop.tokens`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from trainer.errors import ConfigError

Unit = Literal["steps", "tokens"]


class Schedule(Protocol):
    """`factor(progress)` multiplies the base learning rate; progress is 0 before the first step."""

    unit: Unit

    def factor(self, progress: float) -> float: ...


@dataclass(frozen=True, slots=True)
class _Base:
    """Linear warm-up from 1/warmup to 1 (the first step already learns), then `after(x)` of the subclass.

    warmup, total: in `unit`s. Raises ConfigError when the warm-up does not fit into the run.
    """

    total: float
    warmup: float = 0
    unit: Unit = "steps"

    def __post_init__(self) -> None:
        if not 0 <= self.warmup <= self.total:
            raise ConfigError(
                f"schedule.warmup={self.warmup:g} {self.unit} is not between 0 and the {self.total:g} of the run;"
                " shorten the warm-up or lengthen the run (steps; stop.tokens for schedule.unit=tokens)."
            )

    def factor(self, progress: float) -> float:
        """The multiplier of the base learning rate for the step that begins at `progress`."""
        if progress < self.warmup:
            first = 1 if self.unit == "steps" else self.warmup * 1e-3
            return min(1.0, (progress + first) / self.warmup)
        return self.after(progress)

    def after(self, progress: float) -> float:
        """The multiplier once the warm-up is over."""
        raise NotImplementedError

    def fraction(self, progress: float) -> float:
        """How much of the way from the end of the warm-up to the end of the run lies behind, 0 to 1."""
        return min(1.0, (progress - self.warmup) / max(1.0, self.total - self.warmup))


@dataclass(frozen=True, slots=True)
class Constant(_Base):
    """1 after the warm-up."""

    def after(self, progress: float) -> float:
        """Always 1."""
        return 1.0


@dataclass(frozen=True, slots=True)
class Linear(_Base):
    """Straight down to `final` at the end of the run."""

    final: float = 0.0

    def after(self, progress: float) -> float:
        """1 at the end of the warm-up, `final` at the end of the run."""
        return 1.0 + (self.final - 1.0) * self.fraction(progress)


@dataclass(frozen=True, slots=True)
class Cosine(_Base):
    """Half a cosine down to `final` (Loshchilov & Hutter 2017, SGDR, eq. 5, one period)."""

    final: float = 0.0

    def after(self, progress: float) -> float:
        """1 at the end of the warm-up, `final` at the end of the run."""
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * self.fraction(progress)))


@dataclass(frozen=True, slots=True)
class InverseSquareRoot(_Base):
    """sqrt(warmup / progress) after the warm-up (Vaswani et al. 2017, section 5.3, scaled to 1 at its peak)."""

    def after(self, progress: float) -> float:
        """1 at the end of the warm-up; without one, 1 at the first step."""
        anchor = max(self.warmup, 1.0)
        return math.sqrt(anchor / max(progress, anchor))


@dataclass(frozen=True, slots=True)
class WSD(_Base):
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM, section 4.2): linear to `final` over the last `decay` fraction
    of the run."""

    decay: float = 0.2
    final: float = 0.0

    def after(self, progress: float) -> float:
        """1 until the decay begins, `final` at the end of the run."""
        begin = self.total * (1.0 - self.decay)
        if progress <= begin:
            return 1.0
        return 1.0 + (self.final - 1.0) * min(1.0, (progress - begin) / max(1.0, self.total - begin))
