"""What a process allocates and sends, written down from beneath PyTorch's operations; of fake tensors or real ones.

PyTorch's own `torch.distributed._tools.MemTracker` does the same for one module, but knows parameters by its hooks
alone: what ZeRO makes of them it would call temporary, and of collectives it tells nothing. Totals are the same
(`tests/launch/planner/test_count.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten: Any = torch.ops.aten
_KINDS = {"forward": "activations", "loss": "logits"}
_FINENESS = 1.005
"""A snapshot is taken wherever the peak has grown by so much since the last one."""


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective of this rank: kind as PyTorch calls it, num_bytes of the whole tensor, ranks that take part."""

    kind: str
    num_bytes: int
    ranks: int


@dataclass(slots=True)
class _Storage:
    num_bytes: int
    phase: str
    sent: bool = False
    counts: bool = True


@dataclass(slots=True)
class Peak:
    """The most bytes at once, in which phase, and by kind."""

    num_bytes: int = 0
    phase: str = ""
    kinds: dict[str, int] = field(default_factory=dict)


class Ledger(TorchDispatchMode):
    """Follows every storage that comes to be while it is entered, until it is freed.

    phase: of the step, set by `during`; storages are told by the phase that they come from. owners: gives, when it is
    asked, the kind of each storage that something holds, by its key (see `key_of`). With fake tensors, questions that
    only values could answer are answered for a batch without padding and without overflow: numbers are 1, or 0 where
    they are whole, truths are false, and of `nonzero`, `target_fraction` of all places are.
    """

    def __init__(self, target_fraction: float = 1.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "building"
        self.peak = Peak()
        self.collectives: list[Collective] = []
        self.owners: Callable[[], Mapping[int, str]] = dict
        self.num_bytes = 0
        self._target_fraction = target_fraction
        self._storages: dict[int, _Storage] = {}
        self._watchers: dict[int, weakref.ref[Any]] = {}
        self._seen = 0.0
        self._due = False

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if operation is torch.ops.prim.device.default:
            return operation(*arguments)
        fake = bool(arguments) and isinstance(arguments[0], FakeTensor)
        if fake and operation is _aten._local_scalar_dense.default:
            return _answer(arguments[0])
        if fake and operation is _aten.nonzero.default:
            places, dimensions = arguments[0].numel(), arguments[0].dim()
            found = arguments[0].new_empty((round(places * self._target_fraction), dimensions), dtype=torch.int64)
            self._see(found)
            return found
        if self._due:  # only now: what has just been made has its owner
            self.peak.kinds, self._seen, self._due = self.kinds(), self.num_bytes, False
        made = operation(*arguments, **(options or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        if operation.namespace == "c10d":
            self._note(operation, arguments)
        return made

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages or tensor.device.type == "meta":
            return
        num_bytes = storage.nbytes()
        self._storages[key] = _Storage(num_bytes, self.phase)
        self._watchers[key] = weakref.ref(storage, partial(self._forget, key))
        self.num_bytes += num_bytes
        if self.num_bytes > self.peak.num_bytes:
            self.peak.num_bytes, self.peak.phase = self.num_bytes, self.phase
            self._due = self.num_bytes > _FINENESS * self._seen

    def _forget(self, key: int, _: Any) -> None:
        del self._watchers[key]
        gone = self._storages.pop(key)
        self.num_bytes -= gone.num_bytes if gone.counts else 0

    def _note(self, operation: Any, arguments: Any) -> None:
        names = [argument.name for argument in operation._schema.arguments]
        if "process_group" not in names or not arguments:
            return
        group = torch.distributed.ProcessGroup.unbox(arguments[names.index("process_group")])
        operands = [[t for t in tree_leaves(part) if isinstance(t, Tensor)] for part in arguments]
        whole = max(operands, key=lambda tensors: sum(tensor.nbytes for tensor in tensors))
        for tensor in (tensor for tensors in operands for tensor in tensors):
            storage = self._storages.get(key_of(tensor))
            if storage is not None:
                storage.sent = True
        kind = operation._schema.name.partition("::")[2].strip("_")
        self.collectives.append(Collective(kind, sum(tensor.nbytes for tensor in whole), group.size()))

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Inside, storages come from `phase`."""
        outside, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = outside

    def leave_out(self, kinds: frozenset[str]) -> dict[str, int]:
        """Storages of these kinds count no longer, for they lie elsewhere; their bytes by kind."""
        left: dict[str, int] = {}
        for key, kind in self.owners().items():
            storage = self._storages.get(key)
            if kind in kinds and storage is not None and storage.counts:
                storage.counts = False
                self.num_bytes -= storage.num_bytes
                left[kind] = left.get(kind, 0) + storage.num_bytes
        return left

    def begin(self) -> None:
        """Look for the peak, and write down collectives, from now on."""
        self.peak, self._seen = Peak(), 0.0
        self.collectives = []

    def kinds(self) -> dict[str, int]:
        """Bytes by kind, now. What nobody owns is told by the phase it comes from: what is left of the forward pass are
        activations."""
        owners, found = self.owners(), dict[str, int]()
        for key, storage in self._storages.items():
            if storage.counts and storage.num_bytes:
                kind = owners.get(key) or ("buffers of collectives" if storage.sent else _KINDS.get(storage.phase))
                found[kind or "temporary"] = found.get(kind or "temporary", 0) + storage.num_bytes
        return found


def key_of(tensor: Tensor) -> int:
    """What tells the storage of a tensor from others, while it lives."""
    return int(tensor.untyped_storage()._cdata)


def _answer(tensor: Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.dtype.is_floating_point else 0
