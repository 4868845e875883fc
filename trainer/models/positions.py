"""Positions: sinusoidal tables, rotary rotation, relative buckets.

Tables are computed in fp32 and kept outside the module's state, so that a model built on the meta device, cast or moved
needs no repair. They are made as ordinary tensors even when the first call happens in inference mode.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer.models.layers import TokenEmbedding

if TYPE_CHECKING:
    from trainer.models.rotary import RotaryScaling

BLOCK = 512
"""Tables are made for a multiple of so many positions and sliced, so that few are ever made."""


def _rounded_up(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def sinusoidal(start: int, length: int, d_model: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[length, d_model] for positions from `start` on: sin in even, cos in odd dimensions (Vaswani et al. 2017)."""
    return _sinusoidal_table(_rounded_up(start + length), d_model, dtype, device)[start : start + length]


@lru_cache(maxsize=16)
def _sinusoidal_table(length: int, d_model: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        angles = _angles(length, _frequencies(d_model, 10_000.0, device))
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).to(dtype)


def rotary_tables(
    length: int,
    head_dim: int,
    base: float,
    dtype: torch.dtype,
    device: torch.device,
    scaling: RotaryScaling | None = None,
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [at least length, head_dim / 2]: the angle at position t of pair i: t base^(-2i / head_dim),
    changed by `scaling`."""
    return _rotary_tables(_rounded_up(length), head_dim, base, dtype, device, scaling)


@lru_cache(maxsize=16)
def _rotary_tables(
    length: int, head_dim: int, base: float, dtype: torch.dtype, device: torch.device, scaling: RotaryScaling | None
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        frequencies, amplitude = _frequencies(head_dim, base, device), 1.0
        if scaling is not None:
            frequencies, amplitude = scaling.scale(frequencies, base), scaling.amplitude
        angles = _angles(length, frequencies)
        return (angles.cos() * amplitude).to(dtype), (angles.sin() * amplitude).to(dtype)


def _angles(length: int, frequencies: Tensor) -> Tensor:
    return torch.arange(length, dtype=torch.float32, device=frequencies.device)[:, None] * frequencies


def _frequencies(dim: int, base: float, device: torch.device) -> Tensor:
    return base ** -(torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first)
    torch.mul(second, cos, out=out_second)
    out_first.addcmul_(second, sin, value=-sign)
    out_second.addcmul_(first, sin, value=sign)
    return out


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back, so nothing but the tables is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, sin, -1.0), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + head_dim/2}) of each head (RoFormer, Su et al. 2021; paired as in Llama).

    x [..., head_dim]; cos, sin broadcastable to [..., head_dim / 2].
    """
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


@lru_cache(maxsize=16)
def distance_buckets(limit: int, buckets: int, max_distance: int, bidirectional: bool, device: torch.device) -> Tensor:
    """[2 limit + 1] int64: bucket of each distance key - query from -limit to limit (T5, Raffel et al. 2020, 2.1).

    Half of the buckets (of each sign, if bidirectional) stand for one distance each, the rest grow logarithmically up
    to `max_distance`; all beyond share the last. If not bidirectional, keys after the query share the bucket of
    distance 0.
    """
    with torch.inference_mode(False):
        signed = torch.arange(-limit, limit + 1, device=device)
        if bidirectional:
            buckets //= 2
            first, distance = (signed > 0) * buckets, signed.abs()
        else:
            first, distance = torch.zeros_like(signed), (-signed).clamp(min=0)
        exact = buckets // 2
        growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
        far = (exact + growth.long()).clamp(max=buckets - 1)
        return first + torch.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """A learned number per head and bucket of distance, added to attention scores; shared by a stack's layers."""

    def __init__(self, num_heads: int, buckets: int, max_distance: int, bidirectional: bool, std: float) -> None:
        super().__init__()
        self.bucketing = (buckets, max_distance, bidirectional)
        self.table = TokenEmbedding(buckets, num_heads, std)

    def forward(self, start: int, queries: int, keys: int, device: torch.device) -> Tensor:
        """[1, num_heads, queries, keys] for queries at the positions start, start + 1, ...

        The table is looked up once per distance, not once per pair; row i of the result is a window of that line.
        """
        limit = _rounded_up(max(start + queries, keys))
        lowest = limit - (start + queries - 1)
        line: Tensor = self.table(
            distance_buckets(limit, *self.bucketing, device)[lowest : lowest + queries + keys - 1]
        )
        return line.t().unfold(1, keys, 1).flip(1).unsqueeze(0)
