"""Rotary positions beyond the length that a model was trained for: scaled frequencies.

Types and keys are those of `rope_parameters` in a config.json of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from trainer.errors import ConfigError
from trainer.wording import did_you_mean


@dataclass(frozen=True, slots=True)
class Linear:
    """All positions closer together by `factor` (Chen et al. 2023, position interpolation)."""

    factor: float
    amplitude: ClassVar[float] = 1.0

    def scale(self, frequencies: Tensor, base: float) -> Tensor:
        """[head_dim / 2] angles per position -> the same, scaled."""
        return frequencies / self.factor


@dataclass(frozen=True, slots=True)
class Llama3:
    """As `Linear` for wavelengths above original / low_freq_factor, nothing for those below original /
    high_freq_factor, and a blend in between (Grattafiori et al. 2024, Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    amplitude: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"model.rotary_scaling.high_freq_factor={self.high_freq_factor} must be above"
                f" low_freq_factor={self.low_freq_factor}."
            )

    def scale(self, frequencies: Tensor, base: float) -> Tensor:
        """See `Linear`."""
        turns = self.original_max_position_embeddings / (2 * math.pi / frequencies)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies


@dataclass(frozen=True, slots=True)
class Yarn:
    """As `Linear` for pairs that turn fewer than beta_slow times within the original length, nothing for those that
    turn more than beta_fast times, a ramp over the pairs in between; cos and sin times attention_factor (None: 0.1 ln
    factor + 1) (YaRN, Peng et al. 2023, 3.2 to 3.4)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    @property
    def amplitude(self) -> float:
        """Of cos and sin."""
        return self.attention_factor or 0.1 * math.log(max(self.factor, 1.0)) + 1

    def scale(self, frequencies: Tensor, base: float) -> Tensor:
        """See `Linear`."""
        pairs = len(frequencies)

        def pair_turning(times: float) -> float:
            return pairs * math.log(self.original_max_position_embeddings / (times * 2 * math.pi)) / math.log(base)

        first = max(math.floor(pair_turning(self.beta_fast)), 0)
        last = min(math.ceil(pair_turning(self.beta_slow)), 2 * pairs - 1)
        ramp = torch.arange(pairs, dtype=torch.float32, device=frequencies.device) - first
        kept = 1 - (ramp / (last - first if last != first else 1e-3)).clamp(0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies


RotaryScaling = Linear | Llama3 | Yarn

SCALINGS: dict[str, type[RotaryScaling]] = {"linear": Linear, "llama3": Llama3, "yarn": Yarn}
"""By `rope_type`."""


def make_scaling(given: Mapping[str, Any] | None) -> RotaryScaling | None:
    """The scaling that a mapping with `rope_type` and the numbers of that type describes; None for None.

    Raises ConfigError for an unknown type, listing the known, and for numbers that are missing, unknown or none.
    """
    if given is None:
        return None
    numbers = dict(given)
    kind = numbers.pop("rope_type", None)
    if kind not in SCALINGS:
        raise ConfigError(
            f"model.rotary_scaling.rope_type={kind} is not known{did_you_mean(str(kind), SCALINGS)}"
            f" Known are {', '.join(SCALINGS)}; model.rotary_scaling=null is none."
        )
    needed = {field.name: field.default is MISSING for field in fields(SCALINGS[kind])}
    problems = [
        f"model.rotary_scaling.{key} is missing: rope_type={kind} needs it."
        for key, must in needed.items()
        if must and numbers.get(key) is None
    ]
    for key, value in numbers.items():
        place = f"model.rotary_scaling.{key}={value}"
        if key not in needed:
            problems.append(f"{place} is none of rope_type={kind}, which has {', '.join(needed)}.")
        elif value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            problems.append(f"{place} is no number above 0.")
    if problems:
        raise ConfigError(*problems)
    return SCALINGS[kind](**{key: value for key, value in numbers.items() if value is not None})
