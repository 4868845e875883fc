"""How deep and wide a decoder of about so many parameters is: a function of that number and the vocabulary alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainer.errors import ConfigError

ASPECT = 128
"""d_model per layer: that of Llama at 7 and 13 billion parameters (Touvron et al. 2023, table 2: 4096 / 32, 5120 / 40).
At a given number of parameters the loss hardly depends on it: 6 layers of 4288 come within 3 % of 48 layers of 1600
(Kaplan et al. 2020, 3.1)."""

UNIT = 64
"""What d_ff is a multiple of, and the size of a head in models narrower than `WIDE`; wider ones have heads of 128, in
fours, so that tensor parallelism can split them."""

WIDE = 2048


@dataclass(frozen=True, slots=True)
class Shape:
    """Arguments of `Decoder`."""

    d_model: int
    num_heads: int
    num_kv_heads: int
    d_ff: int
    num_layers: int = 1

    def parameters(self, vocab_size: int, tie_embeddings: bool) -> int:
        """How many a Decoder of this shape has."""
        return self.num_layers * self.of_layer() + self.outside(vocab_size, tie_embeddings)

    def of_layer(self) -> int:
        """Parameters of one layer."""
        rows = self.d_model // self.num_heads * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.d_model * (rows + 3 * self.d_ff + 2)

    def outside(self, vocab_size: int, tie_embeddings: bool) -> int:
        """Parameters outside the layers."""
        return self.d_model * (vocab_size * (1 if tie_embeddings else 2) + 1)


def scaled_shape(parameters: float, vocab_size: int, tie_embeddings: bool = False, group_size: int = 1) -> Shape:
    """The shape of about so many parameters, all counted.

    Of all widths, with d_ff = 8/3 d_model (Shazeer 2020) and as many layers as come nearest to `parameters`, the one
    whose d_model per layer is nearest to `ASPECT`; d_ff then makes up for the rounding. group_size: query heads that
    share keys and values; d_model comes in whole groups of heads. Raises ConfigError for fewer parameters than the
    narrowest layer and its vocabulary have.
    """
    narrowest = _layer_of_width(UNIT, group_size)
    if parameters < (least := narrowest.parameters(vocab_size, tie_embeddings)):
        raise ConfigError(
            f"model.parameters={parameters:g} is fewer than the {least:,} of the smallest decoder with"
            f" model.vocab_size={vocab_size}; use more, a smaller vocabulary, or model.tie_embeddings=true."
        )
    shapes: list[Shape] = []
    shape, depth = narrowest, math.inf
    while depth * ASPECT > shape.d_model:
        shape = _layer_of_width(shape.d_model + UNIT if shapes else UNIT, group_size)
        depth = (parameters - shape.outside(vocab_size, tie_embeddings)) / shape.of_layer()
        if depth >= 0.5:
            shapes.append(replace(shape, num_layers=max(round(depth), 1)))
    best = min(shapes, key=lambda one: abs(math.log(one.d_model / one.num_layers / ASPECT)))
    left = parameters - best.parameters(vocab_size, tie_embeddings)
    more = round(left / (3 * best.d_model * best.num_layers * UNIT))
    return replace(best, d_ff=best.d_ff + more * UNIT)


def _layer_of_width(d_model: int, group_size: int) -> Shape:
    """One layer at least so wide, whose heads come in whole groups."""
    head_dim, together = (UNIT, group_size) if d_model < WIDE else (2 * UNIT, math.lcm(group_size, 4))
    heads = math.ceil(d_model / (head_dim * together)) * together
    d_model = heads * head_dim
    return Shape(d_model, heads, heads // group_size, d_ff=max(round(8 / 3 * d_model / UNIT), 1) * UNIT)


def as_decoder(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration's model part; that of a `ScaledDecoder` as the part of the `Decoder` that it is."""
    module, _, name = part["_target_"].rpartition(".")
    if name != "ScaledDecoder":
        return part
    rest = dict(part)
    parameters, group_size = rest.pop("parameters"), rest.pop("group_size", 1)
    shape = scaled_shape(parameters, part["vocab_size"], part.get("tie_embeddings", False), group_size)
    return {**rest, **asdict(shape), "_target_": f"{module}.Decoder"}
