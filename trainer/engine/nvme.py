"""Masters and optimizer states that live on a disk, and are in memory a sub-group at a time.

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

from trainer.errors import SetupError


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
