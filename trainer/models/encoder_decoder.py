"""The Transformer encoder-decoder (Vaswani et al. 2017), with choices that make it a T5 (Raffel et al. 2020), a BART
(Lewis et al. 2020) or a Marian (Junczys-Dowmunt et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.models.attention import CrossAttention, SelfAttention, causal_bias
from trainer.models.base import Model
from trainer.models.cache import AttentionState, KeyValueCache, Memory
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
from trainer.models.positions import RelativeBias, sinusoidal
from trainer.models.segments import Bias, packed_mask, padding_bias, segment_bias

PositionKind = Literal["sinusoidal", "sinusoidal_halves", "learned", "relative"]


class Layer(nn.Module):
    """Self-attention, cross-attention (decoder only) and feed-forward, each with a residual connection and a norm."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        d_kv: int,
        *,
        cross: bool,
        new_norm: Callable[[], nn.Module],
        pre_norm: bool,
        activation: Activation,
        bias: bool,
        scaled: bool,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        key_bias: bool = True,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.dropout = dropout
        attention = {
            "head_dim": d_kv,
            "in_std": d_model**-0.5,
            "out_std": (num_heads * d_kv) ** -0.5,
            "bias": bias,
            "key_bias": key_bias,
            "scaled": scaled,
            "dropout": attention_dropout,
        }
        self.self_norm = new_norm()
        self.self_attention = SelfAttention(d_model, num_heads, **attention)
        self.cross_norm = new_norm() if cross else None
        self.cross_attention = CrossAttention(d_model, num_heads, **attention) if cross else None
        self.feed_forward_norm = new_norm()
        self.feed_forward = FeedForward(
            d_model,
            d_ff,
            activation,
            in_std=d_model**-0.5,
            out_std=d_ff**-0.5,
            bias=bias,
            dropout=activation_dropout,
        )

    def forward(
        self,
        x: Tensor,
        *,
        bias: Bias | None,
        causal: bool = False,
        keys_values: tuple[Tensor, Tensor] | None = None,
        memory_bias: Bias | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """[B, T, d_model] -> [B, T, d_model].

        `keys_values` [N, H, S, d_kv]: the memory of this layer; N may divide B, rows of one source then stand together.
        """
        y = self.self_norm(x) if self.pre_norm else x
        x = self._add(x, self.self_attention(y, bias=bias, causal=causal, cache=cache, layer=layer), self.self_norm)
        if self.cross_attention is not None and keys_values is not None:
            y = self.cross_norm(x) if self.pre_norm and self.cross_norm is not None else x
            grouped = y.view(keys_values[0].shape[0], -1, y.shape[2])
            x = self._add(x, self.cross_attention(grouped, keys_values, memory_bias).view(x.shape), self.cross_norm)
        y = self.feed_forward_norm(x) if self.pre_norm else x
        return self._add(x, self.feed_forward(y), self.feed_forward_norm)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """See `CrossAttention.keys_values`."""
        assert self.cross_attention is not None
        return self.cross_attention.keys_values(memory)

    def _add(self, x: Tensor, y: Tensor, norm: nn.Module | None) -> Tensor:
        x = add_dropped(x, y, self.dropout, self.training)
        return x if self.pre_norm or norm is None else norm(x)


class EncoderDecoder(Model):
    """Encoder and decoder stacks over one shared vocabulary.

    T5 v1.1 is positions="relative", norm="rms", activation="geglu", tie_embeddings=False, bias=False,
    scale_attention=False, scale_embeddings=False. BART is positions="learned", norm_position="post", norm_eps=1e-5,
    activation="gelu", embedding_norm=True, head_bias=True, scale_embeddings=False, scale_tied_head=False. Marian is
    positions="sinusoidal_halves", norm_position="post", norm_eps=1e-5, activation="silu", head_bias=True.

    vocab_size, d_model, num_heads, d_ff, encoder_layers, decoder_layers: the shape; d_kv: size of a head (None: d_model
    / num_heads). dropout: of embeddings and sub-layer outputs; attention_dropout: of attention weights;
    activation_dropout: inside the feed-forward. norm_eps: added to the variance by the norms; embedding_norm: a norm of
    the embedded sequences. bias: of projections and norms; head_bias: of the output head. scale_attention: scores /
    sqrt(d_kv). scale_embeddings: token vectors x sqrt(d_model), with initial deviation 1 / sqrt(d_model); without it
    the deviation is 1 and a tied head divides by sqrt(d_model) instead, unless scale_tied_head is False: neither is
    scaled then, and the deviation is 1 / sqrt(d_model). max_positions: longest source or target (None: any, not for
    "learned").
    """

    objective = "text_to_text"
    packs_rows = True
    splits_positions = True
    fuses_loss = True

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 256,
        num_heads: int = 4,
        d_ff: int = 1024,
        encoder_layers: int = 4,
        decoder_layers: int = 4,
        d_kv: int | None = None,
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        norm: NormKind = "layer",
        norm_position: Literal["pre", "post"] = "pre",
        norm_eps: float = 1e-6,
        embedding_norm: bool = False,
        activation: Activation = "relu",
        positions: PositionKind = "sinusoidal",
        relative_buckets: int = 32,
        relative_max_distance: int = 128,
        bias: bool = True,
        tie_embeddings: bool = True,
        head_bias: bool = False,
        scale_attention: bool = True,
        scale_embeddings: bool = True,
        scale_tied_head: bool = True,
        max_positions: int | None = 512,
    ) -> None:
        super().__init__()
        _check(d_model, num_heads, d_kv, positions, max_positions)
        d_kv = d_kv or d_model // num_heads
        self.overflows_in_fp16 = positions == "relative" and norm == "rms"  # T5
        self.vocab_size, self.max_positions = vocab_size, max_positions
        self.d_model, self.inner_size = d_model, num_heads * d_kv
        self.dropout, self.kind = dropout, positions
        std, pre_norm = d_model**-0.5, norm_position == "pre"
        wide = scale_tied_head and not scale_embeddings  # token vectors of deviation 1
        self.embedding_scale = d_model**0.5 if scale_embeddings else 1.0
        self.tied_scale = std if wide else 1.0
        self.embedding = TokenEmbedding(vocab_size, d_model, 1.0 if wide else std, head_bias and tie_embeddings)
        self.head = None if tie_embeddings else Projection(d_model, [(vocab_size, std)], head_bias)

        new_norm = partial(make_norm, norm, d_model, bias, norm_eps)
        new_layer = partial(
            Layer,
            *(d_model, num_heads, d_ff, d_kv),
            new_norm=new_norm,
            pre_norm=pre_norm,
            activation=activation,
            bias=bias,
            scaled=scale_attention,
            dropout=dropout,
            attention_dropout=attention_dropout,
            activation_dropout=activation_dropout,
        )

        def new_positions(bidirectional: bool) -> nn.Module | None:
            if positions == "relative":
                return RelativeBias(num_heads, relative_buckets, relative_max_distance, bidirectional, std)
            return PositionEmbedding(max_positions or 0, d_model, 0.02) if positions == "learned" else None

        self.encoder_positions = new_positions(bidirectional=True)
        self.encoder_embedding_norm = new_norm() if embedding_norm else None
        self.encoder = nn.ModuleList(new_layer(cross=False) for _ in range(encoder_layers))
        self.encoder_norm = new_norm() if pre_norm else None
        self.decoder_positions = new_positions(bidirectional=False)
        self.decoder_embedding_norm = new_norm() if embedding_norm else None
        self.decoder = nn.ModuleList(new_layer(cross=True) for _ in range(decoder_layers))
        self.decoder_norm = new_norm() if pre_norm else None

    def forward(self, batch: Mapping[str, Tensor], head_loss: HeadLoss | None = None) -> Tensor:
        """source_ids [B,S], source_mask [B,S], decoder_input_ids [B,T] -> logits [B,T,V], or `head_loss` of it.

        Packed rows have source_segment_ids, source_position_ids [B,S], target_segment_ids, target_position_ids [B,T].
        """
        memory, memory_bias = self._encode(batch)
        position_ids, segments = batch.get("target_position_ids"), batch.get("target_segment_ids")
        x, relative = self._embed(batch["decoder_input_ids"], "decoder", 0, position_ids)
        bias: Bias | None = None
        if segments is not None:
            bias = _within(segments, relative, x.dtype, causal=True)
        elif relative is not None:
            bias = relative + causal_bias(x.shape[1], x.dtype, x.device)
        x = self.own_positions(x)
        for layer in _layers(self.decoder):
            keys_values = layer.keys_values(memory)
            x = layer(x, bias=bias, causal=bias is None, keys_values=keys_values, memory_bias=memory_bias)
        return self._logits(x, head_loss)

    def _encode(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Bias]:
        """Memory [B,S,d_model] and what hides it from targets: its padding bias [B,1,1,S], or that of packed rows."""
        position_ids, segments = batch.get("source_position_ids"), batch.get("source_segment_ids")
        x, relative = self._embed(batch["source_ids"], "encoder", 0, position_ids)
        bias: Bias
        memory_bias: Bias
        if segments is None:
            memory_bias = padding = padding_bias(batch["source_mask"], x.dtype)
            bias = padding if relative is None else relative + padding
        else:
            memory_bias = packed_mask(batch["target_segment_ids"], segments, x.dtype)
            bias = _within(segments, relative, x.dtype)
        x = self.own_positions(x)
        for layer in self.encoder:
            x = layer(x, bias=bias)
        return self._finish(x, self.encoder_norm), memory_bias

    def _embed(
        self, ids: Tensor, side: Literal["encoder", "decoder"], start: int, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Vectors [B,T,d_model] of ids from position `start` on, and the relative bias [1,H,T,start+T].

        Absolute positions of packed rows are `position_ids` [B,T] instead; distances are the same in a row.
        """
        positions, norm = (
            (self.encoder_positions, self.encoder_embedding_norm)
            if side == "encoder"
            else (self.decoder_positions, self.decoder_embedding_norm)
        )
        x: Tensor = self.embedding(ids)
        length, bias = ids.shape[1], None
        if self.kind == "relative":
            assert positions is not None
            bias = positions(start, length, start + length, ids.device)
            x = x * self.embedding_scale if self.embedding_scale != 1.0 else x
        else:
            table = (
                sinusoidal(start, length, self.d_model, x.dtype, x.device, self.kind == "sinusoidal_halves")
                if positions is None
                else positions(start, length)
            )
            if position_ids is not None:
                table = F.embedding(position_ids, table)
            x = torch.add(table, x, alpha=self.embedding_scale)
        return dropout(x if norm is None else norm(x), self.dropout, self.training), bias

    def _finish(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        return x if norm is None else dropout(norm(x), self.dropout, self.training)

    def _logits(self, x: Tensor, head_loss: HeadLoss | None = None) -> Tensor:
        x = self._finish(x, self.decoder_norm)
        return self.head_output(x * self.tied_scale if self.head is None and self.tied_scale != 1.0 else x, head_loss)

    def start_decoding(self, batch: Mapping[str, Tensor]) -> AttentionState:
        """Encode source_ids [B,S] (source_mask [B,S]) and compute each decoder layer's memory keys and values once."""
        memory, memory_bias = self._encode(batch)
        assert isinstance(memory_bias, Tensor), "prompts are not packed"
        keys_values = [layer.keys_values(memory) for layer in _layers(self.decoder)]
        return AttentionState(
            cache=KeyValueCache(len(self.decoder)),
            memory=Memory(keys_values, memory_bias, num_sources=memory.shape[0]),
        )

    def decode_step(self, state: AttentionState, token_ids: Tensor) -> Tensor:
        """token_ids [R] at the next position -> logits [R,V] of the one after it."""
        assert state.memory is not None
        cache = state.cache
        x, bias = self._embed(token_ids[:, None], "decoder", start=cache.length)
        for index, layer in enumerate(self.decoder):
            x = layer(
                x,
                bias=bias,
                keys_values=state.memory.keys_values[index],
                memory_bias=state.memory.bias,
                cache=cache,
                layer=index,
            )
        cache.advance(1)
        return self._logits(x)[:, 0]

    def flops_per_sample(self, source_length: int, target_length: int) -> float:
        """Forward and backward: 6 x matrix parameters x positions (Kaplan et al. 2020), attention (PaLM, app. B)."""
        kv_size = 2 * len(self.decoder) * self.d_model * self.inner_size
        encoder, decoder = matrix_size(self.encoder), matrix_size(self.decoder)
        target_parameters = decoder - kv_size + self.vocab_size * self.d_model
        matrices = (encoder + kv_size) * source_length + target_parameters * target_length
        scores = len(self.encoder) * source_length**2 + len(self.decoder) * target_length * (
            target_length + source_length
        )
        return 6.0 * matrices + 12.0 * self.inner_size * scores


def _within(segments: Tensor, relative: Tensor | None, dtype: torch.dtype, causal: bool = False) -> Bias:
    """What keeps the samples of packed rows [B,T] apart, and the relative bias [1,H,T,T] of their positions."""
    if relative is None:
        return packed_mask(segments, segments, dtype, causal)
    return relative + segment_bias(segments, segments, dtype, causal)


def _layers(modules: nn.ModuleList) -> list[Layer]:
    return cast("list[Layer]", list(modules))


def _check(d_model: int, num_heads: int, d_kv: int | None, positions: PositionKind, max_positions: int | None) -> None:
    problems = []
    if d_kv is None and d_model % num_heads:
        problems.append(
            f"model.d_model={d_model} does not divide by model.num_heads={num_heads}; change one or set model.d_kv."
        )
    if positions == "learned" and max_positions is None:
        problems.append("model.positions=learned needs model.max_positions: the size of its table; set a number.")
    if positions in ("sinusoidal", "sinusoidal_halves") and d_model % 2:
        problems.append(f"model.d_model={d_model} is odd, but sinusoidal positions come in pairs; use an even number.")
    if problems:
        raise ConfigError(*problems)
