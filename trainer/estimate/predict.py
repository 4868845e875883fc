"""All terms of a run put together: memory, and the seconds of a step as computation, what of the communication shows,
bubbles and the update."""

from __future__ import annotations

from dataclasses import replace

from trainer.estimate.cluster import Cluster
from trainer.estimate.communication import exchanges
from trainer.estimate.compute import computing, model_flops
from trainer.estimate.fitted import FITTED, MEMORY_ERROR, TIME_ERROR, Fitted
from trainer.estimate.layout import Layout
from trainer.estimate.local import Local
from trainer.estimate.memory import device_terms, host_terms
from trainer.estimate.shape import Shape
from trainer.estimate.terms import Figure, Prediction, Term


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
    saved = (
        shape.trained
        * shape.parameters
        * ((system.master or system.held) + system.moments + (4.0 if layout.ema else 0.0))
    )
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


def step_terms(shape: Shape, layout: Layout, cluster: Cluster, fitted: Fitted = FITTED) -> list[Term]:
    """All seconds of a step; those that overlap count once, as what is longer."""
    compute, m = computing(shape, layout, cluster, fitted), layout.accumulation
    stage = m / layout.pipeline
    size = {"micro-batches": m, "samples of one": layout.micro_size, "stages": float(layout.pipeline)}
    rows = [
        ("products of matrices", compute.products * stage, "operations / (peak x share) + bytes / bandwidth"),
        ("attention", compute.attention * stage, "operations / (peak x share of the kernel)"),
        ("passes over memory", compute.passes * stage, "bytes read and written / bandwidth"),
        ("recomputing", compute.recomputing * stage, f"forward pass of what recompute={layout.recompute} leaves out"),
        ("head and loss", compute.head * m, "operations / (peak x share) + bytes of logits / bandwidth"),
    ]
    terms = [
        Term(name, "compute", value, f"({formula}) x micro-batches", size) for name, value, formula in rows if value
    ]
    busy = sum(term.value for term in terms)
    sent = exchanges(shape, layout, cluster, fitted)
    hideable = sum(one.seconds for one in sent if one.hideable)
    shown = fitted.exposed * hideable
    shown += max(0.0, hideable - shown - busy)
    share = shown / hideable if hideable else 1.0
    for one in sent:
        value = one.seconds * share if one.hideable else one.seconds
        inputs = {**one.inputs, "share that shows": share if one.hideable else 1.0}
        formula = f"({one.formula}) x share that shows"
        terms.append(Term(one.name, "communication", value, formula, inputs, one.link, one.sent, one.seconds - value))
    if layout.pipeline > 1:
        bubble = (layout.pipeline - 1) / (m * layout.interleave)
        inputs = {"stages": float(layout.pipeline), "micro-batches": m, "pieces": float(layout.interleave)}
        formula = "(stages - 1) / (micro-batches x pieces) x computation"
        shown_tensor = sum(one.seconds for one in sent if not one.hideable)
        terms.append(Term("pipeline bubble", "idle", bubble * (busy + shown_tensor), formula, inputs))
    return [*terms, *_update(shape, layout, cluster, fitted)]


def _update(shape: Shape, layout: Layout, cluster: Cluster, fitted: Fitted) -> list[Term]:
    """The optimizer: every state is read and written once; on the host with what goes there and back (ZeRO-Offload, Ren
    et al. 2021)."""
    local, system = Local.of(shape, layout), layout.system
    own = local.parameters / (layout.zero_ranks if layout.zero_stage else 1)
    touched = (
        shape.trained
        * own
        * (2 * system.moments + 2 * (system.master or system.held) + 2 * system.gradient + system.working)
    )
    terms = []
    if layout.offload_optimizer == "none":
        seconds = touched / (cluster.memory_bandwidth * fitted.bandwidth)
        inputs = {"bytes": touched, "bandwidth": cluster.memory_bandwidth * fitted.bandwidth}
        return [Term("update", "compute", seconds, "bytes of states read and written / bandwidth", inputs)]
    per_rank = cluster.cpu_bandwidth / cluster.gpus_per_node * fitted.bandwidth
    inputs = {"bytes": touched, "bandwidth": per_rank}
    terms.append(Term("update on the host", "compute", touched / per_rank, "bytes of states / host bandwidth", inputs))
    moved = shape.trained * own * (system.sent_gradient * layout.accumulation + system.working)
    if layout.offload_parameters != "none":
        moved += own * system.working * 2 * layout.accumulation
    link = cluster.host_bandwidth * fitted.link
    inputs = {"bytes": moved, "bandwidth": link}
    formula = "shard x (gradients x micro-batches + parameters) / bandwidth to the host"
    terms.append(Term("to and from the host", "communication", moved / link, formula, inputs, "host", moved))
    if layout.offload_optimizer == "nvme":
        disk = cluster.disk_bandwidth / cluster.gpus_per_node
        states = 2 * own * (system.master + system.moments)
        inputs = {"bytes": states, "bandwidth": disk}
        terms.append(Term("to and from the disk", "communication", states / disk, "states / bandwidth", inputs, "disk"))
    return terms
