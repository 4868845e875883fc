"""Tensor parallelism (Megatron-LM, Shoeybi et al. 2019, section 3): heads and hidden units are split over ranks.

Of each attention and each feed-forward the first projection is split by rows and the last by columns, so that a rank
computes whole heads and units of its own, and one all-reduce a sub-layer sums what they write. Embeddings, norms, the
relative bias and the output head stay whole on every rank; their gradients are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.models.attention import CrossAttention, SelfAttention
from trainer.models.layers import FeedForward, Projection, RMSNorm, spread_bias
from trainer.models.positions import RelativeBias
from trainer.models.segments import Bias
from trainer.parallel.layout import Layout
from trainer.parallel.slices import Slice, Slices


def split_matrices(model: nn.Module, layout: Layout) -> Slices:
    """Replace the projections of `model` by this rank's parts of them; returns what they are of the whole.

    The new parameters have no values yet. Raises ConfigError where heads or units do not divide, or there are none.
    """
    if layout.tensor == 1:
        return {}
    problems, slices = [], {}
    for name, module in list(model.named_modules()):
        if isinstance(module, SelfAttention | CrossAttention | FeedForward):
            problems += [f"{name}: {problem}" for problem in _misfits(module, layout.tensor)]
            if not problems:
                slices.update({f"{name}.{own}": part for own, part in _split(module, layout).items()})
        elif isinstance(module, RelativeBias):
            # Each rank uses some of the heads; summed where the gradient is small, before distances become pairs.
            module.table.register_forward_hook(lambda _, __, line: _SumGradients.apply(line, layout.tensor_group))  # type: ignore[no-untyped-call]
    if problems:
        raise ConfigError(
            f"engine.tensor_parallel={layout.tensor} does not divide the model: {problems[0]}. Choose a divisor."
        )
    if not slices:
        raise ConfigError(
            f"engine.tensor_parallel={layout.tensor}: {type(model).__name__} has no attention to split;"
            " use engine.tensor_parallel=1."
        )
    for name, parameter in model.named_parameters():
        # A part that no other tensor parallel rank holds; the name of the mark is the one that DeepSpeed looks for.
        parameter.model_parallel = name in slices  # type: ignore[attr-defined]
    return slices


def _misfits(module: nn.Module, parts: int) -> list[str]:
    if isinstance(module, FeedForward):
        sizes = {"d_ff": module.w_in.out_features}
    elif isinstance(module, SelfAttention):
        sizes = {"num_heads": module.num_heads, "num_kv_heads": module.num_kv_heads}
    else:
        assert isinstance(module, CrossAttention)
        sizes = {"num_heads": module.num_heads}
    return [f"{size} {name}" for name, size in sizes.items() if size % parts]


def _split(module: SelfAttention | CrossAttention | FeedForward, layout: Layout) -> dict[str, Slice]:
    """Split one module; the slices of its parameters."""
    slices: dict[str, Slice] = {}

    def rows(name: str, *sizes: int) -> None:
        """The projection `name` has parts of `sizes` rows, each of which is split."""
        whole: Projection = getattr(module, name)
        setattr(module, name, _SplitByRows(whole, layout))
        slices[f"{name}.weight"] = Slice((whole.out_features, whole.in_features), rows=_own_rows(sizes, layout))
        if whole.bias is not None:
            ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
            biased = [size for size, end in zip(sizes, ends, strict=True) if (end - size, end) != whole.unbiased]
            slices[f"{name}.bias"] = Slice((sum(biased),), rows=_own_rows(biased, layout))

    def columns(name: str) -> None:
        whole: Projection = getattr(module, name)
        size = whole.in_features // layout.tensor
        interval = (layout.tensor_rank * size, (layout.tensor_rank + 1) * size)
        setattr(module, name, _SplitByColumns(whole, layout))
        slices[f"{name}.weight"] = Slice((whole.out_features, whole.in_features), columns=interval)

    if isinstance(module, FeedForward):
        rows("w_in", module.w_in.out_features)
        if module.gate is not None:
            rows("gate", module.gate.out_features)
        columns("w_out")
        return slices
    heads = module.num_heads * module.head_dim
    if isinstance(module, SelfAttention):
        rows("qkv", heads, *(module.num_kv_heads * module.head_dim,) * 2)
        module.num_kv_heads //= layout.tensor
        for name in ("q_norm", "k_norm"):
            if getattr(module, name) is not None:
                setattr(module, name, _NormOfOwnHeads(getattr(module, name), layout))
    else:
        rows("q", heads)
        rows("kv", heads, heads)
    columns("out")
    module.num_heads //= layout.tensor
    module.attend = _with_own_heads(module.attend, layout)  # type: ignore[method-assign]
    return slices


def _own_rows(sizes: Sequence[int], layout: Layout) -> tuple[tuple[int, int], ...]:
    """Of parts of `sizes` rows, one after the other, the rows [begin, end) of each that this rank has."""
    places = [sum(sizes[:index]) for index in range(len(sizes))]
    return tuple(
        (place + layout.tensor_rank * size // layout.tensor, place + (layout.tensor_rank + 1) * size // layout.tensor)
        for place, size in zip(places, sizes, strict=True)
    )


def _with_own_heads(attend: Callable[..., Tensor], layout: Layout) -> Callable[..., Tensor]:
    """`attend` for this rank's heads, of a bias for all of them."""

    def own(q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, causal: bool) -> Tensor:
        if isinstance(bias, Tensor) and bias.dim() == 4 and bias.shape[1] > 1:
            bias = bias.chunk(layout.tensor, dim=1)[layout.tensor_rank]
        return attend(q, k, v, bias, causal)

    return own


class _SplitByRows(nn.Linear):
    """This rank's rows of a projection. The input is the same on all ranks, so its gradient is the sum of theirs."""

    def __init__(self, whole: Projection, layout: Layout) -> None:
        dtype, device = whole.weight.dtype, whole.weight.device
        size = whole.out_features // layout.tensor
        super().__init__(whole.in_features, size, bias=False, dtype=dtype, device=device)
        if whole.bias is not None:  # whose own size ZeRO-3 hides
            biased = whole.out_features - (whole.unbiased[1] - whole.unbiased[0])
            self.bias = nn.Parameter(torch.empty(biased // layout.tensor, dtype=dtype, device=device))
        self.unbiased = (whole.unbiased[0] // layout.tensor, whole.unbiased[1] // layout.tensor)
        self.out_features = whole.out_features  # as the others know it
        self._group = layout.tensor_group

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., own rows]."""
        bias = spread_bias(self.bias, self.unbiased)
        return F.linear(_SumGradients.apply(x, self._group), self.weight, bias)  # type: ignore[no-untyped-call]


class _SplitByColumns(nn.Linear):
    """This rank's columns of a projection; what ranks compute is summed, and the bias, which is whole, added once."""

    def __init__(self, whole: Projection, layout: Layout) -> None:
        like = {"dtype": whole.weight.dtype, "device": whole.weight.device}
        super().__init__(whole.in_features // layout.tensor, whole.out_features, whole.bias is not None, **like)
        self.in_features = whole.in_features
        self._group = layout.tensor_group

    def forward(self, x: Tensor) -> Tensor:
        """[..., own columns] -> [..., out_features]."""
        total: Tensor = _Sum.apply(F.linear(x, self.weight), self._group)  # type: ignore[no-untyped-call]
        return total if self.bias is None else total + self.bias


class _NormOfOwnHeads(RMSNorm):
    """A norm of heads, whole on every rank, whose weight's gradient is the sum over the heads of all ranks."""

    def __init__(self, whole: RMSNorm, layout: Layout) -> None:
        super().__init__(whole.normalized_shape, eps=whole.eps, dtype=whole.weight.dtype, device=whole.weight.device)
        self._group = layout.tensor_group

    def forward(self, x: Tensor) -> Tensor:
        """[..., own heads, head_dim] -> the same."""
        return self.scaled_by(_SumGradients.apply(self.weight, self._group), x)  # type: ignore[no-untyped-call]


class _SumGradients(torch.autograd.Function):
    """The identity, whose gradient is summed over the group (Megatron-LM's f)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Sum(torch.autograd.Function):
    """The sum over the group, whose gradient is the identity (Megatron-LM's g)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
