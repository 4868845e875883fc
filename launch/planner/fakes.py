"""Tensors without memory and ranks without processes, under which the trainer's own engines run as they are."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer import cross_entropy, distributed
from trainer.models import attention, decoder, layers

_aten: Any = torch.ops.aten


@contextmanager
def one_of_many(ranks: int) -> Iterator[None]:
    """Inside, this process is rank 0 of so many; collectives do nothing (PyTorch's fake process group)."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "the ranks of a job cannot stand for those of another"
    with patch.dict(os.environ, {"LOCAL_RANK": "0"}):  # DeepSpeed reads it
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        try:
            yield
        finally:
            distributed.leave()


@contextmanager
def without_values() -> Iterator[None]:
    """Inside, tensors have shapes and no memory, whoever makes them (`FakeTensorMode`)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with ExitStack() as stack:
        # PyTorch moves parameters by swapping objects, which it refuses where someone watches them.
        stack.enter_context(patch.object(nn.Module, "_apply", _apply))
        # DeepSpeed asks where a tensor begins, to see that it is aligned.
        stack.enter_context(patch.object(Tensor, "data_ptr", lambda tensor: 512 * tensor.untyped_storage()._cdata))
        stack.callback(_forget_tables)  # those without values
        _forget_tables()  # those with values
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _apply(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    for child in module.children():
        _apply(child, convert)
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data = convert(parameter.data)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = convert(buffer)
    return module


def _forget_tables() -> None:
    """Positions, masks and the like that modules of ours keep from call to call."""
    for name, module in list(sys.modules.items()):
        if name.startswith("trainer.models"):
            for function in list(vars(module).values()):
                if hasattr(function, "cache_clear"):
                    function.cache_clear()


@contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """Inside, models of this project take the ways that they take on a GPU, with tensors that say they are on a CPU:
    fused attention, PyTorch's dropout, and the loss in its larger blocks. Packed rows keep what plain ones do, as under
    FlexAttention.
    """
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (layers, "composed", lambda x: True),
            (attention, "attend", _attend),
            (decoder, "packed_mask", lambda queries, keys, dtype, causal: None),
            (F, "rms_norm", _rms_norm),
            (F, "dropout", lambda x, p: torch.native_dropout(x, p, True)[0]),
            (cross_entropy, "CPU_BLOCK_ELEMENTS", cross_entropy.GPU_BLOCK_ELEMENTS),
        ):
            stack.enter_context(patch.object(owner, name, stand_in))
        yield


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Any, causal: bool, dropout_p: float, scale: float) -> Tensor:
    """FlashAttention, or with a bias PyTorch's memory-efficient kernel."""
    if bias is None:
        out = _aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, causal, scale=scale)[0]
    else:
        if q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        shape = (*q.shape[:3], k.shape[2])
        efficient = partial(_aten._scaled_dot_product_efficient_attention, compute_log_sumexp=True, scale=scale)
        out = efficient(q, k, v, bias.expand(shape), dropout_p=dropout_p, is_causal=causal)[0]
    attended: Tensor = out.transpose(1, 2).flatten(2)
    return attended


def _rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    """Keeps what PyTorch's fused kernel keeps: input, weight and a number a row."""
    normed: Tensor = layers._RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return normed
