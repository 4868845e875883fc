"""All terms of a run put together."""

from __future__ import annotations

from dataclasses import replace

from trainer.estimate.cluster import Cluster
from trainer.estimate.compute import model_flops
from trainer.estimate.fitted import FITTED, MEMORY_ERROR, TIME_ERROR, Fitted
from trainer.estimate.layout import Layout
from trainer.estimate.memory import device_terms, host_terms
from trainer.estimate.shape import Shape
from trainer.estimate.step import step_terms
from trainer.estimate.terms import Figure, Prediction


def predict(shape: Shape, layout: Layout, cluster: Cluster, fitted: Fitted = FITTED) -> Prediction:
    """What a rank of `layout` holds, and what a step takes, on the devices of `cluster`.

    `layout.ranks` counts, not the cluster's number of nodes. For pipelines, of the rank that holds most.
    """
    if cluster.generation == "cpu" and layout.system.attention in ("flash", "cudnn"):
        layout = replace(layout, system=replace(layout.system, attention="cpu"))
    memory = device_terms(shape, layout, cluster, fitted)
    host = host_terms(shape, layout, cluster)
    step = step_terms(shape, layout, cluster, fitted)
    device_bytes = sum(term.value for term in memory)
    host_bytes = sum(term.value for term in host)
    if cluster.generation == "cpu":
        host_bytes += device_bytes
    seconds = sum(term.value for term in step)
    system = layout.system
    saved = shape.parameters * ((system.master or system.held) + system.moments + (4.0 if layout.ema else 0.0))
    nodes = -(-layout.ranks // cluster.gpus_per_node)
    return Prediction(
        memory=tuple(memory),
        host=tuple(host),
        step=tuple(step),
        device_bytes=_figure(device_bytes, MEMORY_ERROR),
        host_bytes=_figure(host_bytes, MEMORY_ERROR),
        step_seconds=_figure(seconds, TIME_ERROR),
        capacity=cluster.capacity,
        host_capacity=cluster.host_capacity,
        ranks=layout.ranks,
        positions=layout.positions,
        model_flops=model_flops(shape, layout),
        peak_flops=cluster.peak_flops.get(layout.precision, cluster.peak_flops["fp32"]),
        checkpoint_bytes=saved,
        checkpoint_seconds=saved / (cluster.disk_bandwidth * nodes),
        price_per_hour=cluster.price_per_hour,
    )


def _figure(value: float, error: tuple[float, float]) -> Figure:
    return Figure(value, value * error[0], value * error[1])
