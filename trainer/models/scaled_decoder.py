"""A `Decoder` of about as many parameters as one says: how deep and wide it is follows from the number alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trainer.errors import ConfigError
from trainer.models.decoder import Decoder

ASPECT = 128
"""d_model per layer: that of Llama at 7 and 13 billion parameters (Touvron et al. 2023, table 2: 4096 / 32, 5120 / 40).
At a given number of parameters the loss hardly depends on it: 6 layers of 4288 come within 3 % of 48 layers of 1600
(Kaplan et al. 2020, 3.1)."""

UNIT = 64
"""What d_ff is a multiple of, and the size of a head in models narrower than `WIDE`; wider ones have heads of 128."""

WIDE = 2048


@dataclass(frozen=True, slots=True)
class Shape:
    """Arguments of `Decoder`."""

    d_model: int
    num_heads: int
    num_kv_heads: int
    d_ff: int
    num_layers: int

    def parameters(self, vocab_size: int, tie_embeddings: bool) -> int:
        """How many a Decoder of this shape has."""
        return self.num_layers * self._of_layer(self.d_ff) + _outside(self.d_model, vocab_size, tie_embeddings)

    def _of_layer(self, d_ff: int) -> int:
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        return self.d_model * (self.d_model // self.num_heads * heads + 3 * d_ff + 2)

    def fitted(self, parameters: float, vocab_size: int, tie_embeddings: bool) -> Shape:
        """This one with the d_ff that comes nearest to `parameters`."""
        left = parameters - _outside(self.d_model, vocab_size, tie_embeddings) - self.num_layers * self._of_layer(0)
        units = max(round(left / (3 * self.d_model * self.num_layers * UNIT)), 1)
        return Shape(self.d_model, self.num_heads, self.num_kv_heads, units * UNIT, self.num_layers)


def _outside(d_model: int, vocab_size: int, tie_embeddings: bool) -> int:
    """Parameters outside the layers."""
    return d_model * (vocab_size * (1 if tie_embeddings else 2) + 1)


def scaled_shape(parameters: float, vocab_size: int, tie_embeddings: bool = False, group_size: int = 1) -> Shape:
    """The shape whose number of parameters, all counted, is nearest to `parameters`.

    Of the widths whose depth is d_model / `ASPECT` and whose d_ff is 8/3 d_model (Shazeer 2020), that with the nearest
    number is taken; then d_ff makes up for the difference. group_size: query heads that share keys and values; d_model
    comes in whole groups of heads, so that large groups leave more to d_ff.
    Raises ConfigError for fewer parameters than the smallest has.
    """
    shape = best = _proportioned(1, group_size)
    least = best.fitted(0, vocab_size, tie_embeddings).parameters(vocab_size, tie_embeddings)
    if parameters < least:
        raise ConfigError(
            f"model.parameters={parameters:g} is fewer than the {least:,} of the smallest decoder with"
            f" model.vocab_size={vocab_size}; use more, a smaller vocabulary, or model.tie_embeddings=true."
        )
    while shape.parameters(vocab_size, tie_embeddings) < 2 * parameters:
        shape = _proportioned(shape.d_model // UNIT + 1, group_size)
        best = min(best, shape, key=lambda one: abs(one.parameters(vocab_size, tie_embeddings) - parameters))
    return best.fitted(parameters, vocab_size, tie_embeddings)


def _proportioned(units: int, group_size: int) -> Shape:
    """The narrowest shape of at least `units` x 64 whose heads come in whole groups."""
    d_model = units * UNIT
    head_dim = UNIT if d_model < WIDE else 2 * UNIT
    heads = -(-d_model // (head_dim * group_size)) * group_size
    d_model = heads * head_dim
    return Shape(
        d_model=d_model,
        num_heads=heads,
        num_kv_heads=heads // group_size,
        d_ff=max(round(8 / 3 * d_model / UNIT), 1) * UNIT,
        num_layers=max(round(d_model / ASPECT), 1),
    )


class ScaledDecoder(Decoder):
    """A `Decoder` of the shape that `scaled_shape` finds for `parameters`; the rest is as there."""

    def __init__(
        self,
        vocab_size: int,
        parameters: float,
        group_size: int = 1,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        tie_embeddings: bool = False,
        rotary_base: float = 10_000.0,
        norm_eps: float = 1e-5,
        init_std: float = 0.02,
        max_positions: int = 2048,
    ) -> None:
        super().__init__(
            vocab_size,
            **asdict(scaled_shape(parameters, vocab_size, tie_embeddings, group_size)),
            dropout=dropout,
            attention_dropout=attention_dropout,
            tie_embeddings=tie_embeddings,
            rotary_base=rotary_base,
            norm_eps=norm_eps,
            init_std=init_std,
            max_positions=max_positions,
        )


def as_decoder(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration's model part; that of a ScaledDecoder as the part of the Decoder that it is."""
    if part["_target_"] != f"{ScaledDecoder.__module__}.{ScaledDecoder.__name__}":
        return part
    rest = dict(part)
    parameters, group_size = rest.pop("parameters"), rest.pop("group_size", 1)
    shape = scaled_shape(parameters, part["vocab_size"], part.get("tie_embeddings", False), group_size)
    return {**rest, **asdict(shape), "_target_": f"{Decoder.__module__}.{Decoder.__name__}"}
