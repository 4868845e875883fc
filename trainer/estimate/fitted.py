"""The numbers that no data sheet tells: fitted on published measurements by `python -m launch.planner.validate --fit`.

Everything else in the formulas is counted from architectures and systems, or read from data sheets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Fitted:
    """Shares of data-sheet rates that software reaches, and what memory is lost.

    products: of the peak, in large products of matrices, by generation. bandwidth: of the device's memory bandwidth.
    eager: passes over memory of plain operations for each that is counted. attention: of the peak, in attention
    kernels, by family and generation. link: of a link's bandwidth, in collectives. exposed: of collectives that could
    hide beneath computation, the part that does not. hop_seconds: of a collective's step from rank to rank.
    fragmentation: of memory that comes and goes, what the allocator holds besides; context_bytes: of libraries.
    """

    products: Mapping[str, float] = field(
        default_factory=lambda: {"volta": 0.70, "ampere": 0.85, "hopper": 0.72, "cdna3": 0.5, "cpu": 0.8}
    )
    bandwidth: float = 0.8
    eager: float = 1.3
    attention: Mapping[str, float] = field(
        default_factory=lambda: {
            "flash1 ampere": 0.40,
            "flash1 hopper": 0.20,
            "flash ampere": 0.55,
            "flash hopper": 0.45,
            "flash volta": 0.30,
            "flash cdna3": 0.30,
            "flash cpu": 0.40,
        }
    )
    link: float = 0.75
    exposed: float = 0.15
    hop_seconds: float = 3e-6
    fragmentation: float = 0.05
    context_bytes: float = 0.6e9


FITTED = Fitted()

MEMORY_ERROR = (0.92, 1.15)
"""The error bar of a rank's memory: 9 of 10 measured values lie between these multiples of the predicted."""

TIME_ERROR = (0.85, 1.20)
"""The same of the seconds of a step."""
