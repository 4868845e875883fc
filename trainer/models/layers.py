"""The layers that models share: embeddings, projections, norms, feed-forward, dropout; how they are initialised."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NormKind = Literal["layer", "rms"]
Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "geglu", "swiglu"]

HeadLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""What an output head computes instead of logits: of hidden [..., d_model], its weight [V, d_model] and its bias [V] or
None. The head calls it within its own `forward`, where ZeRO-3 has gathered its parameters."""


def initialise(module: nn.Module, leaf: str, generator: torch.Generator) -> None:
    """Fill `module`'s own parameter `leaf`: norms one, biases zero, matrices normal as the module's `row_stds` say.

    Matrices of `nn.LSTM` are uniform within 1 / sqrt(hidden size), its forget gates' biases one (Jozefowicz et al.
    2015). Kernels of `nn.Conv1d` and `nn.Conv2d` and matrices of `nn.Linear` feed ReLUs or GELUs: normal with variance
    2 / fan-in (He et al. 2015).
    """
    parameter = getattr(module, leaf)
    shape = tuple(parameter.shape)
    row_stds: Any = getattr(module, "row_stds", None)
    if row_stds is not None and leaf == "weight":
        value = torch.randn(shape, generator=generator, device=generator.device)
        sizes, stds = (list(column) for column in zip(*row_stds, strict=True))
        for rows, std in zip(torch.split(value, sizes), stds, strict=True):
            rows.mul_(std)
    elif isinstance(module, nn.LSTM) and parameter.dim() > 1:
        bound = module.hidden_size**-0.5
        value = torch.rand(shape, generator=generator, device=generator.device).mul_(2 * bound).sub_(bound)
    elif isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) and leaf == "weight":
        std = math.sqrt(2 / math.prod(shape[1:]))
        value = torch.randn(shape, generator=generator, device=generator.device).mul_(std)
    else:
        is_norm = isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm))
        value = torch.full(shape, 1.0 if is_norm and leaf == "weight" else 0.0)
        if isinstance(module, nn.LSTM) and leaf.startswith("bias_ih"):
            value[module.hidden_size : 2 * module.hidden_size] = 1.0
    with torch.no_grad():
        parameter.copy_(value)


def composed(x: Tensor) -> bool:
    """Whether `x` is best left to PyTorch's plain operations: on a GPU, and where a compiler fuses them."""
    return x.device.type != "cpu" or torch.compiler.is_compiling()


class Projection(nn.Linear):
    """A linear map, possibly several fused by rows: `row_stds` gives (rows, standard deviation) of each.

    unbiased: the rows [begin, end) that have no bias; the parameter `bias` is shorter by them.
    """

    def __init__(
        self,
        in_features: int,
        row_stds: Sequence[tuple[int, float]],
        bias: bool = False,
        unbiased: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__(in_features, sum(rows for rows, _ in row_stds), bias=bias)
        self.row_stds = tuple(row_stds)
        self.unbiased = unbiased
        if bias and unbiased[1] > unbiased[0]:
            self.bias = nn.Parameter(self.bias.detach()[: self.out_features - unbiased[1] + unbiased[0]].clone())

    def forward(self, x: Tensor, head_loss: HeadLoss | None = None) -> Tensor:
        """[..., in_features] -> [..., rows], or where it is an output head the `head_loss` of it."""
        bias = spread_bias(self.bias, self.unbiased)
        return F.linear(x, self.weight, bias) if head_loss is None else head_loss(x, self.weight, bias)


def spread_bias(bias: Tensor | None, unbiased: tuple[int, int]) -> Tensor | None:
    """The bias of all rows: `bias`, with zeros for the rows [begin, end) that it leaves out."""
    begin, end = unbiased
    if bias is None or begin == end:
        return bias
    return torch.cat((bias[:begin], bias.new_zeros(end - begin), bias[begin:]))


def matrix_size(module: nn.Module) -> int:
    """Elements of all linear maps inside, also while they are sharded."""
    linear = [inner for inner in module.modules() if isinstance(inner, nn.Linear)]
    return sum(inner.in_features * inner.out_features for inner in linear)


class TokenEmbedding(nn.Module):
    """Token vectors; the same `forward` is the tied output head, so that ZeRO-3 gathers the table for both uses."""

    def __init__(self, vocab_size: int, d_model: int, std: float, head_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        self.head_bias = nn.Parameter(torch.empty(vocab_size)) if head_bias else None
        self.row_stds = ((vocab_size, std),)

    def forward(self, inputs: Tensor, as_head: bool = False, head_loss: HeadLoss | None = None) -> Tensor:
        """Ids [...] int64 -> vectors [..., d_model]; `as_head`: hidden [..., d_model] -> logits [..., vocab_size], or
        the `head_loss` of it."""
        if as_head and head_loss is not None:
            return head_loss(inputs, self.weight, self.head_bias)
        return F.linear(inputs, self.weight, self.head_bias) if as_head else F.embedding(inputs, self.weight)


class PositionEmbedding(nn.Module):
    """Learned absolute positions (Gehring et al. 2017)."""

    def __init__(self, max_positions: int, d_model: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_positions, d_model))
        self.row_stds = ((max_positions, std),)

    def forward(self, start: int, length: int) -> Tensor:
        """Vectors [length, d_model] of the positions start, start + 1, ..."""
        return self.weight[start : start + length]


def make_norm(kind: NormKind, d_model: int, bias: bool = True, eps: float = 1e-6) -> nn.Module:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the last dimension."""
    return RMSNorm(d_model, eps=eps) if kind == "rms" else LayerNorm(d_model, eps=eps, bias=bias)


FEW_POSITIONS = 2048
"""Up to which PyTorch's LayerNorm serves in bf16 on a CPU: its gradients of weight and bias are within 6 % there, and a
small model's step would take 4 % more."""


class _LayerNorm(torch.autograd.Function):
    """LayerNorm in bf16 for a CPU, where PyTorch sums the gradients of weight and bias over all positions in bf16: a
    fifth of them is lost at 32,000 positions. Here the backward pass is in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        wide_bias = None if bias is None else bias.float()
        out, mean, inverse = torch.native_layer_norm(x, x.shape[-1:], weight.float(), wide_bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse = ctx.saved_tensors
        wide_bias = None if bias is None else bias.float()
        wide = grads[0].float(), x.float(), x.shape[-1:], mean, inverse, weight.float(), wide_bias
        made = torch.ops.aten.native_layer_norm_backward(*wide, [True, True, bias is not None])
        return *(None if gradient is None else gradient.to(x.dtype) for gradient in made), None


class LayerNorm(nn.LayerNorm):
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> [..., d_model]."""
        few = x.numel() <= FEW_POSITIONS * x.shape[-1]
        if few or composed(x) or x.dtype == torch.float32 or not torch.is_grad_enabled():
            return super().forward(x)
        return _LayerNorm.apply(x, self.weight, self.bias, self.eps)  # type: ignore[no-any-return, no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    """RMSNorm for a CPU, where PyTorch composes it of twice as many passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        size = x.shape[-1]
        grad, normed = grads[0].reshape(-1, size), (x * inverse).view(-1, size)
        products = grad * normed
        means = (products @ weight).div_(-size)
        grad_x = torch.addcmul(grad * weight, normed, means[:, None]).view_as(x).mul_(inverse)
        return grad_x, products.sum(dim=0), None


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> [..., d_model]."""
        return self.scaled_by(self.weight, x)

    def scaled_by(self, weight: Tensor, x: Tensor) -> Tensor:
        """`forward` with another weight, such as this one with a gradient that is summed over ranks."""
        if composed(x):
            return F.rms_norm(x, self.normalized_shape, weight, self.eps)
        return _RMSNorm.apply(x, weight, self.eps)  # type: ignore[no-any-return, no-untyped-call]


_UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


class FeedForward(nn.Module):
    """w_out(dropout(activation(w_in x))); gated: w_out(dropout(gelu or silu(gate x) * w_in x)) (Shazeer 2020)."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: Activation,
        *,
        in_std: float,
        out_std: float,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.dropout = dropout
        gated = activation in ("geglu", "swiglu")
        self.gate = Projection(d_model, [(d_ff, in_std)], bias) if gated else None
        self.w_in = Projection(d_model, [(d_ff, in_std)], bias)
        self.w_out = Projection(d_ff, [(d_model, out_std)], bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> [..., d_model]."""
        hidden = self.w_in(x)
        if self.gate is not None:
            gate = self.gate(x)
            hidden = (F.silu(gate) if self.activation == "swiglu" else F.gelu(gate, approximate="tanh")) * hidden
        else:
            hidden = _UNGATED[self.activation](hidden)
        out: Tensor = self.w_out(dropout(hidden, self.dropout, self.training))
        return out


def _keep_mask(x: Tensor, p: float) -> Tensor:
    """0 or 1 in the dtype and shape of `x`, 1 with probability 1 - p (to the nearest 2^-16).

    On a CPU `bernoulli_` costs more than the matrix products around it; 16 random bits an element cost a fifth of it.
    """
    if composed(x):
        return torch.empty_like(x).bernoulli_(1 - p)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    return (bits >= round(p * 2**16) - 2**15).to(x.dtype)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Inverted dropout (Srivastava et al. 2014): in training, x * keep / (1 - p)."""
    if not training or p == 0.0:
        return x
    return F.dropout(x, p) if composed(x) else x * _keep_mask(x, p).mul_(1 / (1 - p))


def add_dropped(residual: Tensor, x: Tensor, p: float, training: bool) -> Tensor:
    """residual + dropout(x), in one pass."""
    if not training or p == 0.0:
        return residual + x
    return torch.addcmul(residual, x, _keep_mask(x, p), value=1 / (1 - p))
