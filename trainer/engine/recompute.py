"""Less memory for what the backward pass needs: layers that are computed again, and tensors that wait in host memory.

Applied from outside, to the `forward` of every layer in a model's stacks; models know nothing of it. Random numbers are
drawn again as they were, so dropout, losses and gradients are those of a model that keeps everything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from trainer.config import ActivationOffload, Recompute

_aten = torch.ops.aten
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
"""What `selective` keeps: the results that take most of a layer's time. The rest is quick, and takes most of the
memory."""


def stacked_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model's stacks: what stands in an `nn.ModuleList` and is made of modules itself."""
    layers: list[nn.Module] = []
    within: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in within:
            for layer in module:
                if any(True for _ in layer.children()):
                    layers.append(layer)
                    within.update(layer.modules())
    return layers


def lighten(model: nn.Module, recompute: Recompute, offload: ActivationOffload) -> nn.Module:
    """`model` itself, its layers changed to keep less for the backward pass."""
    if recompute != Recompute.none or offload != ActivationOffload.none:
        for layer in stacked_layers(model):
            layer.forward = partial(_forward, layer, layer.forward, recompute, offload)
    return model


def _forward(
    layer: nn.Module,
    forward: Callable[..., Any],
    recompute: Recompute,
    offload: ActivationOffload,
    /,
    *inputs: Any,
    **options: Any,
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    waiting: AbstractContextManager[Any] = nullcontext()
    if offload == ActivationOffload.cpu:
        waiting = torch.autograd.graph.saved_tensors_hooks(partial(_to_host, layer), _from_host)
    with waiting:
        if recompute == Recompute.none:
            return forward(*inputs, **options)
        # Stopping early would leave out the hooks by which ZeRO-3 gives parameters back.
        how: dict[str, Any] = {"use_reentrant": False, "early_stop": False}
        if recompute == Recompute.selective:
            how["context_fn"] = _keeping_products
        return checkpoint(forward, *inputs, **how, **options)


def _keeping_products() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The contexts of a forward pass that keeps what `_KEPT` makes, and of its repetition."""
    kept: deque[Any] = deque()
    return _Keeping(kept), _Recalling(kept)


class _Keeping(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Puts aside what the operations in `_KEPT` make, in their order; None for what was changed in place later.

    PyTorch's own selective checkpoints also demand that all other operations are the same the second time; ZeRO-3
    gathers parameters in one pass that are there already in the other.
    """

    def __init__(self, kept: deque[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept
        self._places: dict[int, int] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        made = operation(*arguments, **(options or {}))
        if operation in _KEPT:
            for tensor in tree_leaves(made):
                if isinstance(tensor, Tensor):
                    self._places[tensor.untyped_storage()._cdata] = len(self._kept)
            self._kept.append(tree_map_only(Tensor, Tensor.detach, made))
        elif operation._schema.is_mutable:
            for tensor in _changed(operation, arguments, options or {}):
                place = self._places.pop(tensor.untyped_storage()._cdata, None)
                if place is not None:
                    self._kept[place] = None
        return made


def _changed(operation: Any, arguments: Any, options: Any) -> list[Tensor]:
    """What `operation` writes into; of `torch.mul(x, y, out=z)` that is z, not x."""
    written = {
        at: one for at, one in enumerate(operation._schema.arguments) if one.alias_info and one.alias_info.is_write
    }
    given = [arguments[at] if at < len(arguments) else options.get(one.name) for at, one in written.items()]
    return [tensor for tensor in tree_leaves(given) if isinstance(tensor, Tensor)]


class _Recalling(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives back what `_Keeping` has put aside, once."""

    def __init__(self, kept: deque[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if operation in _KEPT and (made := self._kept.popleft()) is not None:
            return made
        return operation(*arguments, **(options or {}))


def _to_host(layer: nn.Module, tensor: Tensor) -> Any:
    """What is kept in place of a tensor: a parameter itself, a copy in page-locked host memory and the device it comes
    from, or what is on the host already."""
    if tensor.device.type == "cpu":
        return tensor
    address = tensor.untyped_storage().data_ptr()
    for parameter in layer.parameters():
        if parameter.untyped_storage().data_ptr() == address:
            return parameter, tensor.size(), tensor.stride(), tensor.storage_offset()
    copy = torch.empty(tensor.size(), dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True), tensor.device


def _from_host(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    if isinstance(kept[0], nn.Parameter):
        parameter, *layout = kept
        return cast("Tensor", parameter.detach().as_strided(*layout))
    copy, device = kept
    return cast("Tensor", copy.to(device, non_blocking=True))
