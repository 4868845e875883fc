"""What lives on a disk: masters and optimizer states, in memory a sub-group at a time; parameters, while they are used.

DeepSpeed reads and writes them with libaio; `optimizer` is its ZeRO-3 optimizer.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trainer.errors import SetupError

_LEAST_BYTES = 1 << 20
"""Of a rank's share of a parameter: DeepSpeed keeps smaller ones in host memory (`MIN_AIO_BYTES`)."""

_SPARE = 3  # buffers beside a layer's own: embedding, head, and one more


def claim_folder(path: str, rank: int) -> None:
    """Make sure that `path` takes files, and remove this rank's at the end of the process.

    Raises SetupError naming the key where it takes none.
    """
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0")
    except OSError as error:
        raise SetupError(
            f"engine.nvme_path: {path} takes no files ({error.strerror}); choose a folder on a local disk that this"
            " user may write to."
        ) from error
    _remove(path, rank)  # what a run that was killed has left
    atexit.register(_remove, path, rank)


def _remove(path: str, rank: int) -> None:
    for folder in Path(path).glob(f"zero_stage_3/*/rank{rank}"):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def in_memory(optimizer: Any, group: int) -> Iterator[None]:
    """Inside, masters and states of the sub-group `group` are in memory; what is written into them goes back to the
    disk. Does nothing for those that stay in memory."""
    if not getattr(optimizer, "swap_optimizer", False) or not optimizer._swappable_optimizer_subgroup(group):
        yield
        return
    optimizer._optimizer_states_and_gradient_swap_in(group)
    try:
        yield
    finally:
        optimizer._optimizer_states_and_gradient_swap_out(group)


def parameter_buffers(model: torch.nn.Module, shards: int) -> dict[str, int]:
    """How many buffers the parameters on the disk are read into, and how many numbers each holds, for `model` (it may
    be on the meta device) over `shards` ranks.

    One holds the largest share, and all together those of a layer, which recomputing keeps until its gradients are
    there.
    """

    def shares(module: torch.nn.Module) -> list[int]:
        sizes = ((-(-parameter.numel() // shards), parameter.element_size()) for parameter in module.parameters())
        return [share for share, size in sizes if share * size >= _LEAST_BYTES]

    stacks = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    layers = [layer for stack in stacks for layer in stack] or [model]
    most = max(len(shares(layer)) for layer in layers)
    return {"buffer_count": most + _SPARE, "buffer_size": max(shares(model), default=1)}


@contextmanager
def present(parameter: Any) -> Iterator[Any]:
    """`parameter`, this rank's share of which is in memory inside; what is written into it goes back to the disk.
    Does nothing where it stays in memory."""
    if parameter.ds_tensor.status.name == "AVAILABLE":
        yield parameter
        return
    parameter.nvme_swapper.swap_in([parameter], async_op=False)
    try:
        yield parameter
    finally:
        parameter.nvme_swapper.swap_out_and_release([parameter])
