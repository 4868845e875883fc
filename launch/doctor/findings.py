"""What a check says: findings, each with what was seen and what mends it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

STATES = ("ok", "warning", "problem", "skipped")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at.

    name: short and stable, such as `disk`. state: of STATES; `problem`: training fails or is wrong; `warning`: it
    may be slow, or something of it is missing; `skipped`: could not be looked at here. seen: what is so. cure: what to
    do; never empty with a warning or problem. figures: what was measured, each with its unit in its name.
    """

    name: str
    state: str
    seen: str
    cure: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.state in STATES, self.state
        assert self.cure or self.state in ("ok", "skipped"), f"{self.name} needs a cure"


def ok(name: str, seen: str, cure: str = "", figures: Mapping[str, float] | None = None) -> Finding:
    """All is well; `cure`, if any, is advice."""
    return Finding(name, "ok", seen, cure, figures or {})


def warning(name: str, seen: str, cure: str, figures: Mapping[str, float] | None = None) -> Finding:
    """Training may be slow, or something that some runs need is missing."""
    return Finding(name, "warning", seen, cure, figures or {})


def problem(name: str, seen: str, cure: str, figures: Mapping[str, float] | None = None) -> Finding:
    """Training fails or goes wrong here."""
    return Finding(name, "problem", seen, cure, figures or {})


def skipped(name: str, seen: str, cure: str = "") -> Finding:
    """Could not be looked at, and why."""
    return Finding(name, "skipped", seen, cure)


def worst(states: list[str]) -> str:
    """The gravest of `states`; `ok` of none."""
    return max(states, key=("skipped", "ok", "warning", "problem").index, default="ok")


def gigabytes(num_bytes: float) -> str:
    """`num_bytes` as people say it: 1.5 GB, 64 MB."""
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"
