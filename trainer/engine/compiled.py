"""`torch.compile` as the engines use it."""

from __future__ import annotations

import warnings

import torch


def compile_module(module: torch.nn.Module) -> None:
    """Let calls of `module` run compiled from now on, for any lengths; its other methods (decoding) stay as they are.

    The output head's fused loss is called between two graphs: its loop over chunks is nothing to compile.
    """
    # Tables of positions are computed within the graph, where a cache of them has no part.
    warnings.filterwarnings("ignore", r"Dynamo detected a call to a `functools\.lru_cache`", UserWarning)
    module.compile(dynamic=True)
