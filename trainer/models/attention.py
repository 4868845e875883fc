"""Multi-head attention (Vaswani et al. 2017, 3.2): self and cross, causal, grouped-query, with an additive bias."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from trainer.models.cache import KeyValueCache
from trainer.models.layers import Projection, RMSNorm, dropout
from trainer.models.positions import rotate
from trainer.models.segments import Bias, Moves, PackedMask, SegmentGrids, masked_score


def causal_bias(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[length, length] to add to scores: zero up to the diagonal, `masked_score` above."""
    return _causal_table(-(-length // 512) * 512, dtype, device)[:length, :length]


@lru_cache(maxsize=8)
def _causal_table(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((length, length), masked_score(dtype), dtype=dtype, device=device).triu(1)


@lru_cache(maxsize=1)
def _compiled_flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _attend_in_lines(q: Tensor, k: Tensor, v: Tensor, segments: SegmentGrids, dropout_p: float, scale: float) -> Tensor:
    """`attend` of each grid of segments by itself."""
    (batch, _, length, head_dim), grids = q.shape, segments.grids

    def lines(x: Tensor, moves: Moves, widths: list[int]) -> list[Tensor]:
        slots = moves.to_slots(x.transpose(1, 2).flatten(0, 1).flatten(1))
        parts = torch.split(slots, [grid.lines * width for grid, width in zip(grids, widths, strict=True)])
        return [
            part.view(grid.lines, width, -1, head_dim).transpose(1, 2)
            for part, grid, width in zip(parts, grids, widths, strict=True)
        ]

    queries = lines(q, segments.queries, [grid.queries for grid in grids])
    keys, values = (lines(x, segments.keys, [grid.keys for grid in grids]) for x in (k, v))
    done = [
        attend(asking, asked, given, grid.bias, segments.causal, dropout_p, scale).flatten(0, 1)
        for grid, asking, asked, given in zip(grids, queries, keys, values, strict=True)
    ]
    return segments.queries.to_rows(torch.cat(done)).view(batch, length, -1)


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: PackedMask, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    flex: Any = _compiled_flex_attention() if q.device.type == "cuda" else flex_attention
    out: Tensor = flex(q, k, v, block_mask=mask.blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out


SHORT = 512
"""Keys up to which plain products beat PyTorch's fused CPU kernel in bf16, whose backward pass is slow: 2 to 9 times on
sentences (`python scripts/bench/attention.py`)."""


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, causal: bool, dropout_p: float, scale: float) -> Tensor:
    """softmax(scale q k^T + bias) v as [B, Q, H * head_dim].

    q [B, H, Q, head_dim]; k, v [B, H_kv, K, head_dim] with H a multiple of H_kv; bias broadcastable to [B, H, Q, K];
    with `causal`, Q = K and there is no bias. `SegmentGrids` are attended to one by one. A `PackedMask` goes to
    FlexAttention, unless there is dropout, which it does not know, heads are too small for its kernel, or operations
    are watched (engine.recompute=selective), which it refuses. On a CPU the fused kernel knows neither dropout nor a
    bias with gradient, PyTorch's fallback is slower than the plain products below, and so is the kernel for short
    sequences in bf16.
    """
    grouped = q.shape[1] != k.shape[1]
    if isinstance(bias, SegmentGrids):
        return _attend_in_lines(q, k, v, bias, dropout_p, scale)
    if isinstance(bias, PackedMask):
        if dropout_p == 0 and q.shape[-1] >= 16 and not is_in_torch_dispatch_mode():
            return _attend_in_blocks(q, k, v, bias, scale).transpose(1, 2).flatten(2)
        bias = bias.bias(q.dtype)
    unfused = dropout_p > 0 or (bias is not None and bias.requires_grad)
    short = q.dtype == torch.bfloat16 and torch.is_grad_enabled() and k.shape[2] <= SHORT
    if q.device.type == "cpu" and (unfused or short):
        if grouped:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.matmul(q * scale if scale != 1.0 else q, k.transpose(-1, -2))
        if causal:
            bias = causal_bias(q.shape[2], q.dtype, q.device)
        weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
        out = torch.matmul(dropout(weights, dropout_p, training=True), v)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=dropout_p, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    return out.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Attention of a sequence over itself; queries, keys and values come from one projection.

    bias: of both projections, or with "qkv" of the first alone. key_bias: whether the keys have a bias where the others
    do. It adds the same to all scores of a query, so the softmax takes it out again; Whisper has none (Radford et al.
    2022). qk_norm_eps: if set, each head's queries and keys go through an RMSNorm with one weight for all heads (Henry
    et al. 2020; as in Qwen3), before they are rotated.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        head_dim: int,
        num_kv_heads: int | None = None,
        in_std: float,
        out_std: float,
        bias: bool | Literal["qkv"] = False,
        key_bias: bool = True,
        scaled: bool = True,
        dropout: float = 0.0,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5 if scaled else 1.0
        self.dropout = dropout
        query_std = in_std if scaled else in_std * head_dim**-0.5
        kv_size = self.num_kv_heads * head_dim
        query_size = num_heads * head_dim
        row_stds = [(query_size, query_std), (kv_size, in_std), (kv_size, in_std)]
        unbiased = (0, 0) if key_bias else (query_size, query_size + kv_size)
        self.qkv = Projection(d_model, row_stds, bool(bias), unbiased)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(head_dim, eps=qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(head_dim, eps=qk_norm_eps)
        self.out = Projection(num_heads * head_dim, [(d_model, out_std)], bias is True)

    def forward(
        self,
        x: Tensor,
        *,
        bias: Bias | None = None,
        causal: bool = False,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """[B, T, d_model] -> [B, T, d_model].

        rotary: (cos, sin) broadcastable to [B, T, 1, head_dim / 2]; with a `cache`, x continues what the cache holds
        for `layer`, and `bias` covers all positions so far.
        """
        batch, length, _ = x.shape
        heads = self.qkv(x).view(batch, length, -1, self.head_dim)
        if rotary is None or self.q_norm is not None:
            q, k, v = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            if rotary is not None:
                q, k = rotate(q, *rotary), rotate(k, *rotary)
        else:
            qk, v = torch.split(heads, [self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=2)
            q, k = torch.split(rotate(qk, *rotary), [self.num_heads, self.num_kv_heads], dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        out: Tensor = self.out(self.attend(q, k, v, bias, causal))
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, causal: bool) -> Tensor:
        """`attend` with this module's dropout and scale; replaced where heads or positions are split over ranks."""
        return attend(q, k, v, bias, causal, self.dropout if self.training else 0.0, self.scale)


class CrossAttention(nn.Module):
    """Attention of a sequence over the encoder's memory; `key_bias`: see `SelfAttention`."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        head_dim: int,
        in_std: float,
        out_std: float,
        bias: bool = False,
        key_bias: bool = True,
        scaled: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5 if scaled else 1.0
        self.dropout = dropout
        inner = num_heads * head_dim
        self.q = Projection(d_model, [(inner, in_std if scaled else in_std * head_dim**-0.5)], bias)
        self.kv = Projection(d_model, [(inner, in_std), (inner, in_std)], bias, (0, 0) if key_bias else (0, inner))
        self.out = Projection(inner, [(d_model, out_std)], bias)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, d_model] -> keys and values, each [B, H, S, head_dim]."""
        heads = self.kv(memory).view(*memory.shape[:2], 2 * self.num_heads, self.head_dim).transpose(1, 2)
        keys, values = heads.chunk(2, dim=1)
        return keys, values

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], bias: Bias | None) -> Tensor:
        """[B, T, d_model] -> [B, T, d_model]; `keys_values` of this layer, `bias` broadcastable to [B, H, T, S]."""
        q = self.q(x).view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)
        out: Tensor = self.out(self.attend(q, *keys_values, bias, False))
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, causal: bool) -> Tensor:
        """See `SelfAttention.attend`."""
        return attend(q, k, v, bias, causal, self.dropout if self.training else 0.0, self.scale)
