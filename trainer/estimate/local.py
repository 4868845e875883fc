"""One rank's part of the model before ZeRO: what tensor and pipeline parallelism leave it."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.estimate.layout import Layout
from trainer.estimate.shape import Shape


@dataclass(frozen=True, slots=True)
class Local:
    """Parameters of one rank's part of the model before ZeRO: matrices by tensor and pipeline ranks, of the stage with
    most. tables: token tables and head."""

    parameters: float
    tables: float
    layer: float

    @classmethod
    def of(cls, shape: Shape, layout: Layout) -> Local:
        """By how `trainer.parallel.tensor` splits, or with the vocabulary split too."""
        if shape.other is not None:
            return cls(shape.parameters, 0.0, shape.other.largest_layer)
        tables = (
            shape.embedding
            * (1 if shape.tied else 2)
            / (1 if layout.system.splits_vocabulary == "none" else layout.tensor)
        )
        vectors = shape.parameters - shape.matrices - shape.embedding * (1 if shape.tied else 2)
        inside = shape.matrices / layout.tensor + vectors
        if layout.pipeline > 1:
            inside, tables = inside / layout.pipeline, tables if shape.tied else tables / 2
        return cls(inside + tables, tables, shape.largest_layer / layout.tensor)
