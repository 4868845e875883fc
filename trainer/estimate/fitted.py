"""The numbers that no data sheet tells: fitted on published measurements by `python -m launch.planner.validate --fit`.

Everything else in the formulas is counted from architectures and systems, or read from data sheets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Fitted:
    """Shares of data-sheet rates that software reaches, and what memory is lost.

    products: of the peak, in large products of matrices, by generation; "hopper early": by libraries of 2023-24.
    bandwidth: of the device's memory bandwidth. eager: passes over memory of plain operations for each that is counted.
    attention: of the peak, in attention kernels, by family and generation. link: of a link's bandwidth, in collectives
    (not fitted: what NCCL's own tests show). exposed: of collectives that could hide beneath computation, the part that
    does not. hop_seconds: of a collective's step from rank to rank. fragmentation: of memory that comes and goes, what
    the allocator holds besides; context_bytes: of libraries and communicators. holes: on a CPU, free memory in the
    C library's heap at the peak, in largest tensors below 32 MiB (`scripts/bench/planner.py`). torn: the same where
    batches vary in length, as a part of what lies in the heap.

    Volta's flash kernel, CDNA3 and the CPU are guesses that no published row checks; cuDNN's attention on Hopper is
    what FlashAttention-3 (Shah et al. 2024, figures 5 and 6) measured of it, forward and backward together.
    """

    products: Mapping[str, float] = field(
        default_factory=lambda: {
            "volta": 0.83,
            "ampere": 0.74,
            "hopper": 0.67,
            "hopper early": 0.565,
            "cdna3": 0.50,
            "cpu": 0.80,
        }
    )
    bandwidth: float = 0.83
    eager: float = 1.62
    attention: Mapping[str, float] = field(
        default_factory=lambda: {
            "flash1 ampere": 0.31,
            "flash1 hopper": 0.20,
            "flash volta": 0.30,
            "flash ampere": 0.55,
            "flash hopper": 0.34,
            "cudnn hopper": 0.50,
            "flash cdna3": 0.30,
            "flash cpu": 0.40,
        }
    )
    link: float = 0.9
    exposed: float = 0.29
    hop_seconds: float = 5.25e-6
    fragmentation: float = 0.02
    context_bytes: float = 2 * 2.0**30
    holes: float = 6.0
    torn: float = 0.18


FITTED = Fitted()

MEMORY_ERROR = (0.85, 1.18)
"""The error bar of a rank's memory: 9 of 10 measured values lie between these multiples of the predicted."""

TIME_ERROR = (0.90, 1.19)
"""The same of the seconds of a step."""
