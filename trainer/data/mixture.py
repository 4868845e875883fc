"""Mixing: which source gives the next record, by weights that hold over any stretch of the stream."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

AtEnd = Literal["repeat", "drop", "stop"]
"""What follows when a source of a mixture ends: its next epoch; the others alone; nothing (the run ends)."""

MixBy = Literal["samples", "tokens"]
"""What the weights count: records, or target tokens."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """Weights of the sources. phases: (first step, weights that sum to 1) in ascending order, from step 0 on."""

    phases: Sequence[tuple[int, tuple[float, ...]]]
    at_ends: Sequence[AtEnd]
    by: MixBy
    seed: int

    def phase(self, step: int) -> int:
        """Index of the phase that holds at an optimizer step."""
        return bisect_right([first for first, _ in self.phases], step) - 1

    def first_credits(self, lane: int) -> tuple[float, ...]:
        """Where a lane begins: shifted against the others, lest all lanes take from the same source at once."""
        bits = np.random.PCG64(np.random.SeedSequence([self.seed & 0xFFFF_FFFF_FFFF_FFFF, lane])).random_raw(
            len(self.at_ends)
        )
        shifts = [float(word) / 2.0**64 for word in bits]
        mean = sum(shifts) / len(shifts)
        return tuple(shift - mean for shift in shifts)

    def choose(self, credits: Sequence[float], active: Sequence[bool], phase: int) -> int:
        """The active source that is owed the most (stride scheduling, Waldspurger and Weihl 1995)."""
        weights = self._weights(active, phase)
        owed = [credit + weight if weight > 0 else -np.inf for credit, weight in zip(credits, weights, strict=True)]
        return max(range(len(owed)), key=owed.__getitem__)

    def charge(
        self, credits: Sequence[float], active: Sequence[bool], phase: int, chosen: int, units: float
    ) -> tuple[float, ...]:
        """Credits after the chosen source gave `units` samples or tokens: every active source earns its share."""
        weights = self._weights(active, phase)
        earned = [credit + units * weight / sum(weights) for credit, weight in zip(credits, weights, strict=True)]
        earned[chosen] -= units
        return tuple(earned)

    def _weights(self, active: Sequence[bool], phase: int) -> list[float]:
        """Those of the active sources; equal ones where all that is left has none."""
        weights = [weight if there else 0.0 for weight, there in zip(self.phases[phase][1], active, strict=True)]
        return weights if any(weights) else [float(there) for there in active]
