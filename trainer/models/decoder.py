"""The decoder-only Transformer of the Llama family (Touvron et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.models.attention import SelfAttention, causal_bias, padding_bias, segment_bias
from trainer.models.base import Model
from trainer.models.cache import AttentionState, KeyValueCache
from trainer.models.layers import FeedForward, Projection, RMSNorm, TokenEmbedding, add_dropped, dropout, matrix_size
from trainer.models.positions import rotary_tables


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
        std: float,
        out_std: float,
        norm_eps: float,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.attention_norm = RMSNorm(d_model, eps=norm_eps)
        self.attention = SelfAttention(
            d_model,
            num_heads,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            in_std=std,
            out_std=out_std,
            dropout=attention_dropout,
        )
        self.feed_forward_norm = RMSNorm(d_model, eps=norm_eps)
        self.feed_forward = FeedForward(d_model, d_ff, "swiglu", in_std=std, out_std=out_std)

    def forward(
        self,
        x: Tensor,
        *,
        bias: Tensor | None,
        causal: bool,
        rotary: tuple[Tensor, Tensor],
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """[B, T, d_model] -> [B, T, d_model]; see `SelfAttention.forward`."""
        y = self.attention_norm(x)
        y = self.attention(y, bias=bias, causal=causal, rotary=rotary, cache=cache, layer=layer)
        x = add_dropped(x, y, self.dropout, self.training)
        return add_dropped(x, self.feed_forward(self.feed_forward_norm(x)), self.dropout, self.training)


class Decoder(Model):
    """A causal language model with RMSNorm, rotary positions, SwiGLU and grouped-query attention.

    vocab_size, d_model, num_heads, num_kv_heads (None: num_heads), d_ff, num_layers: the shape; head_dim: None is
    d_model / num_heads. rotary_base: of the wavelengths ("rope theta"); norm_eps: of RMSNorm. dropout: of embeddings
    and sub-layer outputs. init_std: of all matrices; those that write into the residual stream are divided by sqrt(2
    num_layers) (GPT-2, Radford et al. 2019).
    """

    objective = "causal_lm"
    packs_rows = True
    splits_positions = True

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
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        head_dim = head_dim or d_model // num_heads
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"model.num_heads={num_heads} is not a multiple of model.num_kv_heads={num_kv_heads};"
                " each key/value head serves the same number of query heads."
            )
        if head_dim % 2:
            raise ConfigError(
                f"model.head_dim={head_dim} (d_model / num_heads) must be even: rotary positions turn pairs."
            )
        self.vocab_size = vocab_size
        self.max_positions: int = max_positions
        self.d_model = d_model
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.rotary_base = rotary_base
        self.dropout = dropout
        self.embedding = TokenEmbedding(vocab_size, d_model, init_std)
        self.layers = nn.ModuleList(
            Layer(
                d_model,
                num_heads,
                num_kv_heads,
                head_dim,
                d_ff,
                std=init_std,
                out_std=init_std * (2 * num_layers) ** -0.5,
                norm_eps=norm_eps,
                dropout=dropout,
                attention_dropout=attention_dropout,
            )
            for _ in range(num_layers)
        )
        self.norm = RMSNorm(d_model, eps=norm_eps)
        self.head = None if tie_embeddings else Projection(d_model, [(vocab_size, init_std)])

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """input_ids [B,T], optional attention_mask [B,T] -> logits [B,T,V].

        Padding may stand on either side. On the right it costs nothing: causality hides it. Packed rows have
        segment_ids, position_ids [B,T].
        """
        ids, mask, segments = batch["input_ids"], batch.get("attention_mask"), batch.get("segment_ids")
        x = self._embed(ids)
        cos, sin = self._rotary(x, ids.shape[1])
        angles = cos[None, : ids.shape[1]], sin[None, : ids.shape[1]]
        bias = None
        if segments is not None:
            at = batch["position_ids"]
            angles = cos[at], sin[at]
            bias = segment_bias(segments, segments, x.dtype, causal=True)
        elif mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
            bias = padding_bias(mask, x.dtype) + causal_bias(ids.shape[1], x.dtype, x.device)
        x = self.own_positions(x)
        rotary = self.own_positions(angles[0])[:, :, None], self.own_positions(angles[1])[:, :, None]
        for layer in self.layers:
            x = layer(x, bias=bias, causal=bias is None, rotary=rotary)
        return self._logits(x)

    def _embed(self, ids: Tensor) -> Tensor:
        return dropout(self.embedding(ids), self.dropout, self.training)

    def _rotary(self, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
        return rotary_tables(length, self.head_dim, self.rotary_base, x.dtype, x.device)

    def _logits(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        logits: Tensor = self.embedding(x, as_head=True) if self.head is None else self.head(x)
        return logits

    def start_decoding(self, batch: Mapping[str, Tensor]) -> AttentionState:
        """Read the prompts input_ids [B,P] but for their last tokens: the first `decode_step` takes them (`first_ids`).

        attention_mask [B,P] may leave out padding on either side; every prompt has at least one token.
        """
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        state = AttentionState(cache=KeyValueCache(len(self.layers)), first_ids=ids[:, -1])
        known = ids.shape[1] - 1
        padded = mask is not None and not bool(mask.all())
        if padded and mask is not None:
            order = mask.long().argsort(dim=1, stable=True)
            ids, mask = ids.gather(1, order), mask.gather(1, order)
            state.first_ids = ids[:, -1]
            state.padding = (~mask).sum(dim=1)
        if known == 0:
            return state
        x = self._embed(ids[:, :known])
        bias = None
        cos, sin = self._rotary(x, known)
        rotary = cos[:known, None], sin[:known, None]
        if padded and mask is not None and state.padding is not None:
            state.padding_bias = padding_bias(mask[:, :known], x.dtype)
            bias = state.padding_bias + causal_bias(known, x.dtype, x.device)
            at = (torch.arange(known, device=ids.device) - state.padding[:, None]).clamp(min=0)
            rotary = cos[at][:, :, None], sin[at][:, :, None]
        self._extend(state, x, bias, bias is None, rotary)
        return state

    def decode_step(self, state: AttentionState, token_ids: Tensor) -> Tensor:
        """token_ids [R] at the next position -> logits [R,V] of the one after it."""
        x = self._embed(token_ids[:, None])
        position = state.cache.length
        cos, sin = self._rotary(x, position + 1)
        if state.padding is None:
            rotary = cos[position, None], sin[position, None]
        else:
            rotary = cos[position - state.padding][:, None, None], sin[position - state.padding][:, None, None]
        bias = state.padding_bias
        if bias is not None:
            bias = F.pad(bias, (0, position + 1 - bias.shape[-1]))
        return self._logits(self._extend(state, x, bias, False, rotary))[:, 0]

    def _extend(
        self, state: AttentionState, x: Tensor, bias: Tensor | None, causal: bool, rotary: tuple[Tensor, Tensor]
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
