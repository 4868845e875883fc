"""The decoder-only Transformer: Llama (Touvron et al. 2023), with choices that make it a Qwen or a GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.models.attention import SelfAttention, causal_bias
from trainer.models.base import Model
from trainer.models.cache import AttentionState, KeyValueCache
from trainer.models.layers import (
    Activation,
    FeedForward,
    HeadLoss,
    NormKind,
    PositionEmbedding,
    Projection,
    TokenEmbedding,
    add_dropped,
    dropout,
    make_norm,
    matrix_size,
)
from trainer.models.positions import rotary_tables
from trainer.models.rotary import make_scaling
from trainer.models.scaling import scaled_shape
from trainer.models.segments import Bias, packed_mask, padding_bias

BiasKind = Literal["none", "qkv", "all"]
Rotary = tuple[Tensor, Tensor]


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        d_ff: int,
        *,
        norm: NormKind,
        activation: Activation,
        bias: BiasKind,
        qk_norm: bool,
        std: float,
        out_std: float,
        norm_eps: float,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        everywhere = bias == "all"
        self.attention_norm = make_norm(norm, d_model, everywhere, norm_eps)
        self.attention = SelfAttention(
            d_model,
            num_heads,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            in_std=std,
            out_std=out_std,
            bias="qkv" if bias == "qkv" else everywhere,
            dropout=attention_dropout,
            qk_norm_eps=norm_eps if qk_norm else None,
        )
        self.feed_forward_norm = make_norm(norm, d_model, everywhere, norm_eps)
        self.feed_forward = FeedForward(d_model, d_ff, activation, in_std=std, out_std=out_std, bias=everywhere)

    def forward(
        self,
        x: Tensor,
        *,
        bias: Bias | None,
        causal: bool,
        rotary: Rotary | None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """[B, T, d_model] -> [B, T, d_model]; see `SelfAttention.forward`."""
        y = self.attention_norm(x)
        y = self.attention(y, bias=bias, causal=causal, rotary=rotary, cache=cache, layer=layer)
        x = add_dropped(x, y, self.dropout, self.training)
        return add_dropped(x, self.feed_forward(self.feed_forward_norm(x)), self.dropout, self.training)


class Decoder(Model):
    """A causal language model; as it stands a Llama: RMSNorm, rotary positions, SwiGLU and grouped-query attention.

    Qwen2 is bias="qkv", Qwen3 qk_norm=True; GPT-2 positions="learned", norm="layer", activation="gelu_tanh",
    bias="all", tie_embeddings=True.

    vocab_size, d_model, num_heads, num_kv_heads (None: num_heads), d_ff, num_layers: the shape; head_dim: None is
    d_model / num_heads. dropout: of embeddings and sub-layer outputs; attention_dropout: of attention weights.
    rotary_base: of the wavelengths ("rope theta"); rotary_scaling: None, or a mapping as `trainer.models.rotary` wants
    it. bias: "none", "qkv" (of queries, keys and values), "all" (of all projections and of LayerNorm). qk_norm: RMSNorm
    of each head's queries and keys. norm_eps: of all norms. init_std: of all matrices; those that write into the
    residual stream are divided by sqrt(2 num_layers) (GPT-2, Radford et al. 2019). max_positions: the longest sequence.
    Raises ConfigError for a shape that does not divide.
    """

    objective = "causal_lm"
    packs_rows = True
    splits_positions = True
    fuses_loss = True

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 256,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        d_ff: int = 688,
        num_layers: int = 4,
        head_dim: int | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        tie_embeddings: bool = False,
        rotary_base: float = 10_000.0,
        norm_eps: float = 1e-5,
        init_std: float = 0.02,
        max_positions: int = 2048,
        positions: Literal["rotary", "learned"] = "rotary",
        rotary_scaling: Mapping[str, Any] | None = None,
        norm: NormKind = "rms",
        activation: Activation = "swiglu",
        bias: BiasKind = "none",
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        _check(d_model, num_heads, num_kv_heads, head_dim, positions, rotary_scaling)
        self.vocab_size = vocab_size
        self.max_positions: int = max_positions
        self.d_model = d_model
        self.num_heads = num_heads
        self.head_dim = head_dim or d_model // num_heads
        self.rotary_base = rotary_base
        self.rotary_scaling = make_scaling(rotary_scaling)
        self.dropout = dropout
        self.embedding = TokenEmbedding(vocab_size, d_model, init_std)
        self.positions = PositionEmbedding(max_positions, d_model, init_std) if positions == "learned" else None
        self.layers = nn.ModuleList(
            Layer(
                d_model,
                num_heads,
                num_kv_heads,
                self.head_dim,
                d_ff,
                norm=norm,
                activation=activation,
                bias=bias,
                qk_norm=qk_norm,
                std=init_std,
                out_std=init_std * (2 * num_layers) ** -0.5,
                norm_eps=norm_eps,
                dropout=dropout,
                attention_dropout=attention_dropout,
            )
            for _ in range(num_layers)
        )
        self.norm = make_norm(norm, d_model, bias == "all", norm_eps)
        self.head = None if tie_embeddings else Projection(d_model, [(vocab_size, init_std)])

    def forward(self, batch: Mapping[str, Tensor], head_loss: HeadLoss | None = None) -> Tensor:
        """input_ids [B,T], optional attention_mask [B,T] -> logits [B,T,V], or the `head_loss` (see `head_output`).

        Padding may stand on either side. On the right it costs nothing: causality hides it. Packed rows have
        segment_ids, position_ids [B,T].
        """
        ids, mask, segments = batch["input_ids"], batch.get("attention_mask"), batch.get("segment_ids")
        if mask is not None and (segments is not None or not bool((mask[:, 1:] > mask[:, :-1]).any())):
            mask = None  # it has nothing to add
        at = None if segments is None else batch["position_ids"]
        if mask is not None and self.positions is not None:
            at = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        x, rotary = self._embed(ids, at)
        bias: Bias | None = None
        if segments is not None:
            bias = packed_mask(segments, segments, x.dtype, causal=True)
        elif mask is not None:
            bias = padding_bias(mask, x.dtype) + causal_bias(ids.shape[1], x.dtype, x.device)
        x = self.own_positions(x)
        if rotary is not None:
            rotary = self.own_positions(rotary[0]), self.own_positions(rotary[1])
        for layer in self.layers:
            x = layer(x, bias=bias, causal=bias is None, rotary=rotary)
        return self._logits(x, head_loss)

    def _embed(self, ids: Tensor, at: Tensor | None, start: int = 0) -> tuple[Tensor, Rotary | None]:
        """Vectors [B,T,d_model] of ids, and the rotation of their heads, cos and sin each [B or 1,T,1,head_dim/2].

        at: positions [B,T] below start + T; None: those from `start` on. Rotated heads only know distances, so their
        positions may as well be those of a row padded on the left.
        """
        x: Tensor = self.embedding(ids)
        end = start + ids.shape[1]
        if self.positions is not None:
            table = self.positions(0, end) if at is not None else self.positions(start, ids.shape[1])
            x = x + (table if at is None else F.embedding(at, table))
            return dropout(x, self.dropout, self.training), None
        tables = rotary_tables(end, self.head_dim, self.rotary_base, x.dtype, x.device, self.rotary_scaling)
        cos, sin = (table[None, start:end] if at is None else table[at] for table in tables)
        return dropout(x, self.dropout, self.training), (cos[:, :, None], sin[:, :, None])

    def _logits(self, x: Tensor, head_loss: HeadLoss | None = None) -> Tensor:
        return self.head_output(self.norm(x), head_loss)

    def start_decoding(self, batch: Mapping[str, Tensor]) -> AttentionState:
        """Read the prompts input_ids [B,P] but for their last tokens: the first `decode_step` takes them (`first_ids`).

        attention_mask [B,P] may leave out padding on either side; every prompt has at least one token.
        """
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        state = AttentionState(cache=KeyValueCache(len(self.layers)), first_ids=ids[:, -1])
        known = ids.shape[1] - 1
        at = bias = None
        if mask is not None and not bool(mask.all()):
            order = mask.long().argsort(dim=1, stable=True)
            ids, mask = ids.gather(1, order), mask.gather(1, order)
            state.first_ids = ids[:, -1]
            state.padding = (~mask).sum(dim=1)
            at = (torch.arange(known, device=ids.device) - state.padding[:, None]).clamp(min=0)
        if known == 0:
            return state
        x, rotary = self._embed(ids[:, :known], at)
        if at is not None and mask is not None:
            state.padding_bias = padding_bias(mask[:, :known], x.dtype)
            bias = state.padding_bias + causal_bias(known, x.dtype, x.device)
        self._extend(state, x, bias, bias is None, rotary)
        return state

    def decode_step(self, state: AttentionState, token_ids: Tensor) -> Tensor:
        """token_ids [R] at the next position -> logits [R,V] of the one after it."""
        position = state.cache.length
        at = None if state.padding is None else (position - state.padding)[:, None]
        x, rotary = self._embed(token_ids[:, None], at, position)
        bias = state.padding_bias
        if bias is not None:
            bias = F.pad(bias, (0, position + 1 - bias.shape[-1]))
        return self._logits(self._extend(state, x, bias, False, rotary))[:, 0]

    def _extend(
        self, state: AttentionState, x: Tensor, bias: Tensor | None, causal: bool, rotary: Rotary | None
    ) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x, bias=bias, causal=causal, rotary=rotary, cache=state.cache, layer=index)
        state.cache.advance(x.shape[1])
        return x

    def flops_per_sample(self, target_length: int) -> float:
        """Forward and backward: 6 x matrix parameters x positions (Kaplan et al. 2020), attention (PaLM, app. B)."""
        matrices = matrix_size(self.layers) + self.vocab_size * self.d_model
        scores = len(self.layers) * self.num_heads * self.head_dim * target_length**2
        return 6.0 * matrices * target_length + 12.0 * scores


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


def _check(
    d_model: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int | None,
    positions: str,
    rotary_scaling: Mapping[str, Any] | None,
) -> None:
    problems = []
    if head_dim is None and d_model % num_heads:
        problems.append(
            f"model.d_model={d_model} does not divide by model.num_heads={num_heads}; change one or set model.head_dim."
        )
    if num_heads % num_kv_heads:
        problems.append(
            f"model.num_heads={num_heads} is not a multiple of model.num_kv_heads={num_kv_heads};"
            " each key/value head serves the same number of query heads."
        )
    head_dim = head_dim or d_model // num_heads
    if positions == "rotary" and head_dim % 2:
        problems.append(f"model.head_dim={head_dim} (d_model / num_heads) must be even: rotary positions turn pairs.")
    if positions == "learned" and rotary_scaling is not None:
        problems.append("model.rotary_scaling scales rotary positions, not model.positions=learned; set it to null.")
    if problems:
        raise ConfigError(*problems)
