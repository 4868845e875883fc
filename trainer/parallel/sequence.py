"""Sequence parallelism by exchange of heads (DeepSpeed-Ulysses, Jacobs et al. 2023), for encoder-decoders too.

Every rank of a group embeds whole sequences and keeps its own part of the positions. Around each attention ranks
exchange positions for heads: there, a rank sees all positions, of its own heads alone, and so masks, relative biases
and packed segments stay what they are. In evaluation mode nothing is split: a rank has whole sequences of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.models.attention import CrossAttention, SelfAttention
from trainer.models.base import Model
from trainer.models.segments import Bias
from trainer.parallel.layout import Layout
from trainer.tasks import IGNORE, Batch


def split_positions(model: nn.Module, layout: Layout) -> None:
    """Let `model` keep this rank's part of the positions, and its attentions exchange them for heads.

    Raises ConfigError where the model cannot, or its heads do not divide.
    """
    if layout.sequence == 1:
        return
    if not isinstance(model, Model) or not model.splits_positions:
        raise ConfigError(
            f"engine.sequence_parallel={layout.sequence}: {type(model).__name__} does not split its positions;"
            " use engine.sequence_parallel=1."
        )
    if model.max_positions is not None and model.max_positions % layout.sequence:
        raise ConfigError(
            f"engine.sequence_parallel={layout.sequence} does not divide model.max_positions={model.max_positions}, to"
            " which sequences may be padded; choose a divisor."
        )
    model.own_positions = _own_positions(model, layout)  # type: ignore[method-assign, assignment]
    for name, module in model.named_modules():
        if isinstance(module, SelfAttention | CrossAttention):
            heads = module.num_kv_heads if isinstance(module, SelfAttention) else module.num_heads
            if heads % (layout.sequence * layout.tensor):
                raise ConfigError(
                    f"engine.sequence_parallel={layout.sequence} x engine.tensor_parallel={layout.tensor} does not"
                    f" divide the {heads} key/value heads of {name}; choose a divisor."
                )
            module.attend = _with_all_positions(module, module.attend, layout)  # type: ignore[method-assign]


def own_part(batch: Batch, layout: Layout) -> Batch:
    """A batch as a rank trains on it: sequences padded so that they divide, and of the labels its own positions."""
    if layout.sequence == 1:
        return batch
    padded = {name: _padded(name, tensor, layout.sequence) for name, tensor in batch.items()}
    return {**padded, "labels": padded["labels"].chunk(layout.sequence, dim=1)[layout.sequence_rank].contiguous()}


def _padded(name: str, tensor: Tensor, parts: int) -> Tensor:
    """[B, T] with T a multiple of `parts`; nothing sees the new positions: masks, segments and weights are zero."""
    missing = -tensor.shape[1] % parts
    return F.pad(tensor, (0, missing), value=IGNORE if name == "labels" else 0) if missing else tensor


def _own_positions(model: nn.Module, layout: Layout) -> Callable[[Tensor], Tensor]:
    def own(x: Tensor) -> Tensor:
        return x.chunk(layout.sequence, dim=1)[layout.sequence_rank] if model.training else x

    return own


def _with_all_positions(module: nn.Module, attend: Callable[..., Tensor], layout: Layout) -> Callable[..., Tensor]:
    """`attend` over all positions for the heads of this rank, from and to its own positions for all heads."""

    def own(q: Tensor, k: Tensor, v: Tensor, bias: Bias | None, causal: bool) -> Tensor:
        if not module.training:
            return attend(q, k, v, bias, causal)
        q, k, v = (_exchange(x, layout) for x in (q, k, v))
        if isinstance(bias, Tensor) and bias.dim() == 4 and bias.shape[1] > 1:
            bias = bias.chunk(layout.sequence, dim=1)[layout.sequence_rank]
        out = attend(q, k, v, bias, causal)
        return _exchange(out, layout)

    return own


def _exchange(x: Tensor, layout: Layout) -> Tensor:
    """[B, heads, own positions, ...] -> [B, own heads, positions, ...]; [B, positions, own heads] -> [B, own positions,
    heads]."""
    out: Tensor = _Exchange.apply(x, layout.sequence_group, layout.sequence, 1, 2)  # type: ignore[no-untyped-call]
    return out


class _Exchange(torch.autograd.Function):
    """Cut dimension `split` into as many parts as there are ranks, give each rank one, and join what comes along
    `join`; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, parts: int, split: int, join: int) -> Tensor:
        ctx.settings = group, parts, split, join
        sent = torch.stack(x.chunk(parts, dim=split))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return torch.cat(received.unbind(), dim=join)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        group, parts, split, join = ctx.settings
        return _Exchange.apply(grads[0], group, parts, join, split), None, None, None, None  # type: ignore[no-untyped-call]
