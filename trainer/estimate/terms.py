"""What a prediction is made of: terms that say how they came about, and totals with an error bar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["device", "host", "compute", "communication", "idle"]


@dataclass(frozen=True, slots=True)
class Term:
    """One part of a total. value: bytes of a rank (device, host) or seconds of a step (all other kinds).

    formula: how it was computed, in the words of `inputs`; link: what a communication goes over, "within" or "between"
    nodes; bytes_sent: what a rank sends in a step. hidden: seconds of it that run beneath computation and are not in
    `value`.
    """

    name: str
    kind: Kind
    value: float
    formula: str
    inputs: Mapping[str, float]
    link: str = ""
    bytes_sent: float = 0.0
    hidden: float = 0.0


@dataclass(frozen=True, slots=True)
class Figure:
    """A predicted number and the ends of its error bar, between which 9 of 10 published measurements lie."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a rank holds and what a step takes.

    memory: terms of bytes on the device at the peak; host: bytes of host memory of one rank; step: terms of seconds.
    device_bytes, host_bytes, step_seconds: their totals; the `Figure`s come from the residuals of
    `python -m launch.planner.validate`. capacity: bytes that a rank may use of its device. positions: of a step, source
    and target, all ranks.
    """

    memory: tuple[Term, ...]
    host: tuple[Term, ...]
    step: tuple[Term, ...]
    device_bytes: Figure
    host_bytes: Figure
    step_seconds: Figure
    capacity: float
    host_capacity: float
    ranks: int
    positions: float
    model_flops: float
    """Floating-point operations of a step that the mathematics asks for, all ranks; recomputing is not in it."""
    peak_flops: float
    """Of one device, FLOP/s, in the precision of the run."""
    checkpoint_bytes: float
    checkpoint_seconds: float
    price_per_hour: float | None
    """Of one device, in the cluster's currency."""

    @property
    def fits(self) -> bool:
        """Whether the peak lies within the device's and the host's memory."""
        return self.device_bytes.value <= self.capacity and self.host_bytes.value <= self.host_capacity

    @property
    def surely_fits(self) -> bool:
        """Whether the upper end of the error bar does, too."""
        return self.device_bytes.high <= self.capacity and self.host_bytes.high <= self.host_capacity

    @property
    def tokens_per_second(self) -> float:
        """Positions, source and target with padding, over all ranks."""
        return self.positions / self.step_seconds.value

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization (PaLM, Chowdhery et al. 2022, appendix B): `model_flops` over the peak's."""
        return self.model_flops / (self.step_seconds.value * self.ranks * self.peak_flops)

    def seconds_to(self, tokens: float) -> float:
        """Time until so many positions have been trained on."""
        return tokens / self.tokens_per_second

    def cost_to(self, tokens: float) -> float | None:
        """Price of that; None where the cluster names none."""
        if self.price_per_hour is None:
            return None
        return self.seconds_to(tokens) / 3600 * self.ranks * self.price_per_hour
