"""Bytes of a rank on its device at the peak of a step, and in its host's memory, term by term."""

from __future__ import annotations

from trainer.estimate import activations
from trainer.estimate.cluster import Cluster
from trainer.estimate.fitted import FITTED, Fitted
from trainer.estimate.layout import Layout
from trainer.estimate.local import Local
from trainer.estimate.shape import Shape
from trainer.estimate.terms import Term

CHUNK_ELEMENTS = 2**25
BLOCK_ELEMENTS = 2**27
"""Of logits, and of fp32 scratch on a GPU, that `trainer.cross_entropy` has at once; the same numbers as there."""

LOGIT_BYTES = {"kernel": 4.0, "compiled": 8.0, "eager": 14.0}
"""Of a logit that exists as a whole, in bf16: the logit and its gradient, each 2; without a kernel fp32 of 4 for the
gradient, and without a compiler also for the copy and for the log of the softmax (later its gradient)."""

HOST_PROCESS_BYTES = 3e9
"""Of a Python process with torch and its libraries on a GPU machine."""

CPU_PROCESS_BYTES = 0.45e9
"""The same with the CPU build of torch, DeepSpeed and datasets."""


def device_terms(shape: Shape, layout: Layout, cluster: Cluster, fitted: Fitted = FITTED) -> list[Term]:
    """What is on the device at the peak. Sources: ZeRO (Rajbhandari et al. 2020, sections 3.1 and 5), Korthikanti et
    al. 2022 (section 4), and the code of our engines (docs/sharding.md)."""
    local = Local.of(shape, layout)
    states = _states(local, layout, shape.trained)
    passing = _passing(shape, layout, local, cluster)
    moving = sum(term.value for term in passing)
    on_cpu = cluster.generation == "cpu"
    losses = [
        Term(
            "fragmentation",
            "device",
            fitted.fragmentation * moving,
            "fragmentation x (activations + logits + buffers)",
            {"fragmentation": fitted.fragmentation, "activations + logits + buffers": moving},
        ),
        Term(
            "libraries",
            "device",
            CPU_PROCESS_BYTES if on_cpu else fitted.context_bytes,
            "of one process",
            {},
        ),
    ]
    return [*states, *passing, *losses]


def _states(local: Local, layout: Layout, trained: float) -> list[Term]:
    """Parameters, masters, gradients and optimizer states between two micro-batches."""
    system, stage, n = layout.system, layout.zero_stage, layout.zero_ranks
    whole = system.whole_gradients and layout.accumulation > 1 and n > 1
    gradient = 4.0 if whole else system.gradient
    away = layout.offload_optimizer != "none"
    rows = (
        ("parameters", system.held, n if stage == 3 else 1, layout.offload_parameters == "none"),
        ("masters", trained * system.master, n if stage else 1, not away),
        ("gradients", trained * gradient, n if stage >= 2 and not whole else 1, not (away and stage >= 2)),
        ("optimizer states", trained * system.moments, n if stage else 1, not away),
        ("average of the weights", trained * 4.0 if layout.ema else 0.0, n if stage else 1, not away),
    )
    return [
        Term(
            name,
            "device",
            local.parameters * bytes_each / ranks if here else 0.0,
            "parameters of the rank x bytes / ranks that share them" if here else "offloaded",
            {"parameters of the rank": local.parameters, "bytes": bytes_each, "ranks that share them": ranks},
        )
        for name, bytes_each, ranks, here in rows
        if bytes_each
    ]


def _passing(shape: Shape, layout: Layout, local: Local, cluster: Cluster) -> list[Term]:
    """What comes and goes within a step."""
    system = layout.system
    gathered, gathered_formula = _gathered(layout, local)
    arriving, arriving_formula = _arriving(layout, local)
    arriving *= shape.trained
    stored = _stored(shape, layout)
    working = activations.working_bytes(shape, layout) if shape.other is None else 0.0
    logits, logits_formula = logit_bytes(shape, layout, cluster.generation == "cpu")
    if layout.pipeline > 1:  # the last stage has the logits, and the first the most micro-batches
        spare = stored * (1 - 1 / min(layout.pipeline, max(1.0, layout.accumulation)))
        logits = max(0.0, logits - spare)
    at_head = logits >= working + arriving
    later = "0: the peak is elsewhere in the step"
    inputs = {"positions": layout.micro_size * (layout.source_length + layout.target_length)}
    return [
        Term(
            "gathered parameters",
            "device",
            gathered,
            gathered_formula,
            {"bytes": system.working, "parameters of the rank": local.parameters, "of a layer": local.layer},
        ),
        Term(
            "buffers of collectives",
            "device",
            _buffers(layout, cluster),
            "2 buckets of gradients" if layout.zero_stage >= 2 else "none",
            {"elements of a bucket": system.bucket_elements, "bytes": system.arriving},
        ),
        Term(
            "arriving gradients",
            "device",
            0.0 if at_head else arriving,
            later if at_head else arriving_formula,
            {"bytes": system.arriving, "parameters of the rank": local.parameters, "of a layer": local.layer},
        ),
        Term(
            "activations",
            "device",
            0.0 if layout.offload_activations == "cpu" else stored,
            f"layers x bytes that a layer keeps (recompute={layout.recompute}), embeddings",
            {**inputs, "layers": float(shape.layers), "d_model": float(shape.d_model)},
        ),
        Term(
            "activations of a layer",
            "device",
            0.0 if at_head else working,
            later if at_head else "one layer computed again, and its gradients",
            inputs,
        ),
        Term(
            "logits",
            "device",
            logits if at_head else 0.0,
            logits_formula if at_head else later,
            {**inputs, "vocabulary": float(shape.vocab_size), "d_model": float(shape.d_model)},
        ),
    ]


def _stored(shape: Shape, layout: Layout) -> float:
    if shape.other is not None:
        width = 4.0 if layout.precision == "fp32" else 2.0
        return width * shape.other.activations * layout.micro_size
    return activations.stored_bytes(shape, layout) + activations.embedded_bytes(shape, layout)


def _gathered(layout: Layout, local: Local) -> tuple[float, str]:
    """ZeRO-3's parameters that are whole for a while."""
    system = layout.system
    if layout.zero_stage < 3 or (layout.zero_ranks == 1 and layout.offload_parameters == "none"):
        cast = system.working if system.held > system.working else 0.0
        if layout.zero_stage < 3 or not cast:
            return 0.0, "none: parameters are whole"
        return cast * (2 * local.layer + local.tables), "bytes x (2 layers + token tables)"
    if system.live_elements:
        most = min(local.parameters, system.live_elements + local.layer)
        return system.working * most, "bytes x min(parameters of the rank, 1e9 + a layer)"
    return system.working * (2 * local.layer + local.tables), "bytes x (2 layers + token tables)"


def _arriving(layout: Layout, local: Local) -> tuple[float, str]:
    """Gradients as the backward pass makes them, until they are summed or sent."""
    system, stage = layout.system, layout.zero_stage
    if stage == 0:
        return system.arriving * local.parameters, "bytes x parameters of the rank"
    if stage == 1:
        return 0.0, "none: they are held"
    if stage == 3 and not system.live_elements:
        each = system.arriving + 4.0
        return each * (local.layer + local.tables / 2), "(bytes + 4 on the wire) x (a layer + the head)"
    return system.arriving * 2 * local.layer, "bytes x 2 layers"


def _buffers(layout: Layout, cluster: Cluster) -> float:
    """DeepSpeed's buckets; on a CPU there is one, and pages of it that are not used take no memory."""
    system = layout.system
    if layout.zero_stage < 2 or not system.bucket_elements:
        return 0.0
    return system.bucket_elements * system.arriving * (1 if cluster.generation == "cpu" else 2)


def logit_bytes(shape: Shape, layout: Layout, on_cpu: bool) -> tuple[float, str]:
    """What the head and its loss hold at once, and by which formula."""
    if shape.other is not None or not shape.vocab_size or shape.classifies:
        return 0.0, "none"
    length = layout.target_length or layout.source_length
    positions = layout.micro_size * length * layout.target_fraction / (layout.sequence * layout.context)
    vocabulary = shape.vocab_size / (layout.tensor if layout.system.splits_vocabulary == "logits" else 1)
    if layout.system.head_loss != "fused":
        each = LOGIT_BYTES[layout.system.head_loss] * (1.2 if layout.precision == "fp32" else 1.0)
        return each * positions * vocabulary, "bytes x positions x vocabulary"
    width = 4.0 if layout.precision == "fp32" else 2.0
    elements = min(positions * vocabulary, CHUNK_ELEMENTS)
    scratch = 0.0 if layout.precision == "fp32" else 4.0 * min(elements, 2.0**18 if on_cpu else BLOCK_ELEMENTS)
    chunks = positions * vocabulary > CHUNK_ELEMENTS
    gradients = width * positions * shape.d_model + (4.0 if chunks else width) * vocabulary * shape.d_model
    return (
        width * elements + scratch + gradients,
        "a chunk of logits, fp32 scratch, gradients of hidden states and head",
    )


def host_terms(shape: Shape, layout: Layout, cluster: Cluster) -> list[Term]:
    """What one rank has in its host's memory (ZeRO-Offload, Ren et al. 2021, section 4; ours: docs/sharding.md)."""
    local = Local.of(shape, layout)
    system, n = layout.system, layout.zero_ranks
    states = shape.trained * (system.master + system.moments + 4.0)
    own = local.parameters / (n if layout.zero_stage else 1)
    on_cpu = cluster.generation == "cpu"
    rows: list[tuple[str, float, str, dict[str, float]]] = []
    if not on_cpu:
        rows.append(("process", HOST_PROCESS_BYTES, "of one process", {}))
    if layout.offload_optimizer == "cpu":
        rows.append(
            ("offloaded optimizer", states * own, "(masters + states + fp32 gradients) x shard", {"shard": own})
        )
    if layout.offload_optimizer == "nvme":
        most = min(own, 5 * 5e7)
        rows.append(("swapping buffers", 4.0 * most, "4 bytes x min(shard, 5 x 5e7)", {"shard": own}))
    if layout.offload_parameters != "none":
        rows.append(("offloaded parameters", system.held * own, "bytes x shard", {"shard": own}))
    if layout.offload_activations == "cpu" and not on_cpu:
        rows.append(("offloaded activations", _stored(shape, layout), "what would be on the device", {}))
    if layout.offload_optimizer == "none" and not on_cpu:
        saved = shape.trained * ((system.master or system.held) + system.moments)
        rows.append(("snapshot of a checkpoint", saved * own, "(masters + states) x shard", {"shard": own}))
    return [Term(name, "host", value, formula, inputs) for name, value, formula, inputs in rows]
