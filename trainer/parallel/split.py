"""A model split over ranks as a layout says, and whether a planned one can be."""

from __future__ import annotations

import torch
from torch import nn

from trainer.engine.base import BuildModel
from trainer.parallel.layout import Layout, layout_of_first_rank
from trainer.parallel.sequence import split_positions
from trainer.parallel.slices import Slices
from trainer.parallel.tensor import split_matrices
from trainer.plan import RunPlan


def split_model(model: nn.Module, layout: Layout) -> Slices:
    """Leave this rank's part of `model`; returns what its parameters are of the whole.

    Raises ConfigError where the model cannot be split so.
    """
    split_positions(model, layout)  # first: what is exchanged are the heads that the split of matrices leaves
    return split_matrices(model, layout)


def check_split(build_model: BuildModel, plan: RunPlan) -> None:
    """Raise ConfigError where the model cannot be split as planned; before anything is written or paid for."""
    with torch.device("meta"):
        model = build_model()
    split_model(model, layout_of_first_rank(plan))
