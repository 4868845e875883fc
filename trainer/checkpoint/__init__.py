"""Checkpoints: whole or absent, and independent of the number of ranks and of the engine that wrote them.

    checkpoints/step_00000200/
        shard_00000.safetensors ...   the fragments each rank held: key "PARAMETER|STATE|START", flat pieces, fp32
        state.json                    TrainState, optimizer scalars, the position of every data lane
        manifest.json                 written last: sizes and SHA-256 of the others, shapes of the parameters
    checkpoints/latest                the name of the newest whole one
    checkpoints/best                  the name of the best one by the task's headline metric

`save.py` writes into a temporary folder that is renamed when every rank is done; `load.py` reads from any such folder
just the ranges that a rank's fragments ask for, whatever ranks and engine wrote it.
"""

from __future__ import annotations

SEPARATOR = "|"
FORMAT = 1


def step_name(step: int) -> str:
    """The folder of a step: step_00000200."""
    return f"step_{step:08d}"
