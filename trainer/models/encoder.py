"""The Transformer encoder of BERT (Devlin et al. 2019), with a head for masked tokens, one for classes, or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.models.base import Model
from trainer.models.encoder_layer import EncoderLayer
from trainer.models.layers import (
    HeadLoss,
    LayerNorm,
    PositionEmbedding,
    Projection,
    TokenEmbedding,
    dropout,
    matrix_size,
)
from trainer.models.segments import Bias, packed_mask, padding_bias

HeadKind = Literal["masked_lm", "classification", "none"]


class Encoder(Model):
    """BERT: token, position and token-type vectors, post-norm layers, and a head.

    vocab_size, d_model, num_heads, d_ff, num_layers: the shape. token_types: kinds of token (first text, second text).
    dropout: of embeddings, sub-layer outputs and before the classifier. norm_eps: of LayerNorm. init_std: of all
    matrices. head: "masked_lm" predicts each token through the token vectors (tied) with a bias of its own,
    "classification" one of `num_classes` from the first position, "none" gives the vectors themselves.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 256,
        num_heads: int = 4,
        d_ff: int = 1024,
        num_layers: int = 4,
        token_types: int = 2,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        norm_eps: float = 1e-12,
        init_std: float = 0.02,
        head: HeadKind = "masked_lm",
        num_classes: int | None = None,
        max_positions: int = 512,
    ) -> None:
        super().__init__()
        _check(d_model, num_heads, head, num_classes)
        self.vocab_size = vocab_size
        self.max_positions: int = max_positions
        self.d_model = d_model
        self.dropout = dropout
        self.objective = "text_classification" if head == "classification" else head
        self.packs_rows = self.splits_positions = head != "classification"  # which looks at first positions
        self.fuses_loss = masked_lm = head == "masked_lm"
        self.embedding = TokenEmbedding(vocab_size, d_model, init_std, head_bias=masked_lm)
        self.positions = PositionEmbedding(max_positions, d_model, init_std)
        self.token_types = TokenEmbedding(token_types, d_model, init_std)
        self.embedding_norm = LayerNorm(d_model, eps=norm_eps)
        self.layers = nn.ModuleList(
            EncoderLayer(
                d_model,
                num_heads,
                d_ff,
                pre_norm=False,
                std=init_std,
                norm_eps=norm_eps,
                dropout=dropout,
                attention_dropout=attention_dropout,
            )
            for _ in range(num_layers)
        )
        square = [(d_model, init_std)]
        self.transform = Projection(d_model, square, bias=True) if masked_lm else None
        self.transform_norm = LayerNorm(d_model, eps=norm_eps) if masked_lm else None
        self.pooler = None if masked_lm else Projection(d_model, square, bias=True)
        self.classifier = Projection(d_model, [(num_classes, init_std)], bias=True) if num_classes else None

    def forward(self, batch: Mapping[str, Tensor], head_loss: HeadLoss | None = None) -> Tensor:
        """input_ids [B,T] -> logits [B,T,V] of the masked language model, or its `head_loss` (see `trainer.models`);
        [B,C] of the classifier, else [B,T,d_model].

        Optional: attention_mask [B,T] bool; token_type_ids [B,T] int64, else all 0; segment_ids, position_ids [B,T] of
        packed rows.
        """
        x = self._encode(batch)
        if self.transform is not None and self.transform_norm is not None:
            x = self.transform_norm(F.gelu(self.transform(x)))
            logits: Tensor = self.embedding(x, as_head=True, head_loss=head_loss)
            return logits
        if self.classifier is not None:
            classes: Tensor = self.classifier(dropout(self.pool(x), self.dropout, self.training))
            return classes
        return x

    def pool(self, x: Tensor) -> Tensor:
        """tanh of a dense layer on the first position: [B,T,d_model] -> [B,d_model]."""
        assert self.pooler is not None, "the masked language model has no pooler"
        return torch.tanh(self.pooler(x[:, 0]))

    def _encode(self, batch: Mapping[str, Tensor]) -> Tensor:
        ids, mask, segments = batch["input_ids"], batch.get("attention_mask"), batch.get("segment_ids")
        table = self.positions(0, ids.shape[1])
        if segments is not None:
            table = F.embedding(batch["position_ids"], table)
        x = self.embedding(ids) + table + self.token_types(batch.get("token_type_ids", ids.new_zeros(1, 1)))
        x = dropout(self.embedding_norm(x), self.dropout, self.training)
        bias: Bias | None = None
        if segments is not None:
            bias = packed_mask(segments, segments, x.dtype)
        elif mask is not None:
            bias = padding_bias(mask, x.dtype)
        x = self.own_positions(x)
        for layer in self.layers:
            x = layer(x, bias=bias)
        return x  # type: ignore[no-any-return]

    def flops_per_sample(self, source_length: int) -> float:
        """Forward and backward: 6 x matrix parameters x positions (Kaplan et al. 2020), attention (PaLM, app. B)."""
        once = sum(matrix_size(module) for module in (self.pooler, self.classifier) if module is not None)
        head = 0 if self.transform is None else matrix_size(self.transform) + self.vocab_size * self.d_model
        scores = len(self.layers) * self.d_model * source_length**2
        return 6.0 * ((matrix_size(self.layers) + head) * source_length + once) + 12.0 * scores


def _check(d_model: int, num_heads: int, head: HeadKind, num_classes: int | None) -> None:
    problems = []
    if d_model % num_heads:
        problems.append(f"model.d_model={d_model} does not divide by model.num_heads={num_heads}; change one.")
    if head not in ("masked_lm", "classification", "none"):
        problems.append(f"model.head={head} is not known; use masked_lm, classification or none.")
    if (head == "classification") != bool(num_classes):
        shown = "null" if num_classes is None else num_classes
        problems.append(
            f"model.num_classes={shown} with model.head={head}: classification needs a number of classes, the other"
            " heads have none (null)."
        )
    if problems:
        raise ConfigError(*problems)
