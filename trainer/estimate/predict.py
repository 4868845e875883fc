"""All terms of a run put together."""

from __future__ import annotations

from trainer.estimate.cluster import Cluster
from trainer.estimate.layout import Layout
from trainer.estimate.shape import Shape
from trainer.estimate.terms import Prediction


def predict(shape: Shape, layout: Layout, cluster: Cluster) -> Prediction:
    """What a rank of `layout` holds, and what a step takes, on the devices of `cluster`.

    `layout.ranks` counts, not the cluster's number of nodes. For pipelines, of the rank that holds most.
    """
    raise NotImplementedError
