"""Checkpoints: whole or absent, and independent of the number of ranks and of the engine that wrote them.

    checkpoints/step_00000200/
        shard_00000.safetensors ...   the fragments each rank held: key "PARAMETER|STATE|START", flat pieces, fp32;
                                      "...|BEGIN:END" of a matrix of which the rank had these columns
        state.json                    TrainState, optimizer scalars, the position of every data lane
        manifest.json                 written last: sizes and SHA-256 of the others, shapes of the parameters
    checkpoints/latest                the name of the newest whole one
    checkpoints/best                  the name of the best one by the task's headline metric

`save.py` writes into a temporary folder that is renamed when every rank is done; `load.py` reads from any such folder
just the ranges that a rank's fragments ask for, whatever ranks and engine wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Collection

SEPARATOR = "|"
FORMAT = 1


def step_name(step: int) -> str:
    """The folder of a step: step_00000200."""
    return f"step_{step:08d}"


def is_step_name(name: str) -> bool:
    """Whether a checkpoint's folder is called so."""
    return re.fullmatch(r"step_[0-9]{8,}", name) is not None


def kept(names: Collection[str], keep: int, keep_every: int | None, best: str | None) -> set[str]:
    """Which of the checkpoints `names` stay: the newest `keep`, the best, and those of steps that `keep_every`
    divides."""
    newest = sorted(names)[-max(1, keep) :]
    return {
        name
        for name in names
        if name in newest
        or name == best
        or (keep_every is not None and int(name.removeprefix("step_")) % keep_every == 0)
    }
