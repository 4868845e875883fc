"""What a run will take, before it runs: memory of a rank, seconds of a step, by formulas that are shown.

`predict(shape, layout, cluster)` is pure arithmetic on floats: a fraction of a millisecond, and no torch.
`shape_of(config)` and `layout_of(config, ranks)` read a configuration; a `Shape`, `Layout` and `System` may as well be
made by hand, for systems other than ours. `load_cluster(name)` finds the machines. Every `Term` of a `Prediction` tells
its formula and what went into it; sources and errors are in docs/planner.md.
"""

from trainer.estimate.cluster import Cluster, known_clusters, load_cluster
from trainer.estimate.layout import OURS, Layout, System
from trainer.estimate.predict import predict
from trainer.estimate.reading import layout_of, sequence_lengths, shape_of
from trainer.estimate.shape import Other, Shape
from trainer.estimate.terms import Figure, Prediction, Term

__all__ = [
    "OURS",
    "Cluster",
    "Figure",
    "Layout",
    "Other",
    "Prediction",
    "Shape",
    "System",
    "Term",
    "known_clusters",
    "layout_of",
    "load_cluster",
    "predict",
    "sequence_lengths",
    "shape_of",
]
