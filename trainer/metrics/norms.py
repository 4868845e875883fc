"""The norm of the gradient by groups of layers: which parts of the network learn, and which stand still or explode.

An engine tells of each parameter what this rank holds of its squared norm (`Engine.squares`); the exchange of a logged
step sums that over ranks, by group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum


class Norms(StrEnum):
    """Which norms of the gradient are logged beside that of the whole: none, by part of the model, or by layer."""

    none = "none"
    parts = "parts"
    layers = "layers"


_INPUT = ("embed", "position", "token_type", "class_token", "patch", "stem", "conv1", "conv2", "shared", "wte", "wpe")
_OUTPUT = ("head", "classifier", "transform", "readout", "score", "pooler")
_OTHER = "other"


def group_of(parameter: str, by: Norms) -> str:
    """The group of a parameter by its name: `embeddings`, `encoder`, `decoder`, `layers` (of a model with one stack),
    `head`, or `other`; with `by=layers` those of a stack have its layer behind them: `encoder.03`."""
    before, layer = _split_at_number(parameter.split("."))
    words = [word.lower() for word in before]
    if layer is None and any(sign in word for word in words for sign in _INPUT):
        return "embeddings"
    stacks = (stack for stack in ("encoder", "decoder") for word in words if word.startswith(stack))
    stack = next(stacks, "layers" if layer is not None or words[-2:-1] == ["norm"] else None)
    if stack is None:
        return "head" if any(sign in word for word in words for sign in _OUTPUT) else _OTHER
    return f"{stack}.{layer:02}" if by == Norms.layers and layer is not None else stack


def _split_at_number(words: Sequence[str]) -> tuple[Sequence[str], int | None]:
    """What stands before the first number of a dotted name, and the number: the place in a stack of layers."""
    for place, word in enumerate(words):
        if word.isdecimal():
            return words[:place], int(word)
    return words, None


class LayerGroups:
    """The groups of a model's trained parameters, in the model's order, the same on all ranks."""

    def __init__(self, parameters: Iterable[str], by: Norms) -> None:
        """parameters: names of those that are trained."""
        self._group = {name: group_of(name, by) for name in parameters} if by != Norms.none else {}
        self.names = list(dict.fromkeys(self._group.values()))

    def sums(self, squares: Mapping[str, float]) -> list[float]:
        """Of what this rank has of each parameter's squared norm, the sum in each group."""
        sums = dict.fromkeys(self.names, 0.0)
        for name, square in squares.items():
            sums[self._group[name]] += square
        return list(sums.values())

    def norms(self, sums: Sequence[float], norm: float) -> dict[str, float]:
        """Each group's norm in seven digits, of the sums over all ranks and the norm of the whole gradient; {} where it
        has none that is finite. The sums may have a factor in common, as those of a gradient that has been clipped."""
        total = math.fsum(sums)
        if not (math.isfinite(norm) and math.isfinite(total) and total > 0):
            return {}
        norms = (norm * math.sqrt(one / total) for one in sums)
        return {name: float(f"{one:.7g}") for name, one in zip(self.names, norms, strict=True)}
