"""The layer of encoders that read without writing: BERT's after Vaswani et al. 2017, ViT's with norms in front."""

from __future__ import annotations

from torch import Tensor, nn

from trainer.models.attention import SelfAttention
from trainer.models.layers import FeedForward, LayerNorm, add_dropped
from trainer.models.segments import Bias


class EncoderLayer(nn.Module):
    """Attention and a GELU feed-forward with biases, each with a residual connection.

    pre_norm: x + attention(norm(x)), then x + feed_forward(norm(x)); else norm(x + attention(x)), then norm(x +
    feed_forward(x)). std: of all matrices.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        *,
        pre_norm: bool,
        std: float,
        norm_eps: float,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.dropout = dropout
        self.attention_norm = LayerNorm(d_model, eps=norm_eps)
        self.attention = SelfAttention(
            d_model,
            num_heads,
            head_dim=d_model // num_heads,
            in_std=std,
            out_std=std,
            bias=True,
            dropout=attention_dropout,
        )
        self.feed_forward_norm = LayerNorm(d_model, eps=norm_eps)
        self.feed_forward = FeedForward(d_model, d_ff, "gelu", in_std=std, out_std=std, bias=True)

    def forward(self, x: Tensor, *, bias: Bias | None = None) -> Tensor:
        """[B, T, d_model] -> [B, T, d_model]; see `SelfAttention.forward`."""
        if self.pre_norm:
            x = add_dropped(x, self.attention(self.attention_norm(x), bias=bias), self.dropout, self.training)
            return add_dropped(x, self.feed_forward(self.feed_forward_norm(x)), self.dropout, self.training)
        x = self.attention_norm(add_dropped(x, self.attention(x, bias=bias), self.dropout, self.training))
        return self.feed_forward_norm(add_dropped(x, self.feed_forward(x), self.dropout, self.training))  # type: ignore[no-any-return]
