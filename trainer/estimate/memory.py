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

PREFETCHED = 5e7
"""Elements that DeepSpeed's ZeRO-3 gathers into a buffer at once, before it copies them into parameters."""

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
    """What comes and goes within a step: at the head's loss, when the backward pass begins or ends, or when ZeRO-1
    sends gradients, whichever is most."""
    system, stage = layout.system, layout.zero_stage
    gathered, gathered_formula = _gathered(layout, local)
    first, last, formula = _arriving(layout, local)
    stored = 0.0 if layout.offload_activations == "cpu" else _stored(shape, layout)
    working = activations.working_bytes(shape, layout) if shape.other is None else 0.0
    logits, logits_formula = logit_bytes(shape, layout, cluster.generation == "cpu")
    if layout.pipeline > 1:  # the last stage has the logits, and the first the most micro-batches
        spare = stored * (1 - 1 / min(layout.pipeline, max(1.0, layout.accumulation)))
        logits = max(0.0, logits - spare)
    bucket, sent = _bucket(layout, local, cluster), _sent_at_once(layout, local)
    # (activations, logits, a layer's, arriving gradients, buffers) of each moment
    moments = [
        (stored, logits, 0.0, 0.0, bucket if stage == 3 else 0.0),
        (stored, 0.0, working, shape.trained * first, bucket),
        (0.0, 0.0, working, shape.trained * last, bucket),
        (0.0, 0.0, 0.0, 0.0, shape.trained * sent),
    ]
    kept, at_head, of_layer, arriving, buffers = max(moments, key=sum)
    inputs = {"positions": layout.micro_size * (layout.source_length + layout.target_length)}
    own = {"bytes": system.arriving, "parameters of the rank": local.parameters, "of a layer": local.layer}
    outside = {"vocabulary": float(shape.vocab_size), "d_model": float(shape.d_model)}
    rows = [
        ("gathered parameters", gathered, gathered_formula, own),
        ("buffers of collectives", buffers, "elements of the buckets x bytes", {"elements": system.bucket_elements}),
        ("arriving gradients", arriving, formula, own),
        ("activations", kept, f"layers x bytes that a layer keeps (recompute={layout.recompute}), embeddings", inputs),
        ("activations of a layer", of_layer, "one layer computed again, and its gradients", inputs),
        ("logits", at_head, logits_formula, {**inputs, **outside}),
    ]
    later = "0: there is none, or the peak is elsewhere in the step"
    return [Term(name, "device", value, text if value else later, known) for name, value, text, known in rows]


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
        most = min(local.parameters, system.live_elements + local.layer) + min(local.parameters, PREFETCHED)
        return system.working * most, "bytes x (min(parameters of the rank, 1e9 + a layer) + 5e7 being copied)"
    return system.working * (2 * local.layer + local.tables), "bytes x (2 layers + token tables)"


def _arriving(layout: Layout, local: Local) -> tuple[float, float, str]:
    """Gradients as the backward pass makes them, until they are summed or sent: when it begins, when it ends."""
    system, stage = layout.system, layout.zero_stage
    head = system.arriving * local.tables / 2
    if stage == 0:
        return head, system.arriving * local.parameters, "bytes x parameters of the rank that have got theirs"
    if stage == 1:
        return 0.0, 0.0, "none: they are held"
    if stage == 3 and not system.live_elements:
        each = system.arriving + 4.0
        found = each * (local.layer + local.tables / 2)
        return found, found, "(bytes + 4 on the wire) x (a layer + the head)"
    return head, system.arriving * 2 * local.layer, "bytes x (the head, or 2 layers)"


def _bucket(layout: Layout, local: Local, cluster: Cluster) -> float:
    """DeepSpeed's buckets, two where they overlap with computation; on a CPU, unused pages take no memory."""
    system = layout.system
    if layout.zero_stage < 2 or not system.bucket_elements:
        return 0.0
    elements = system.bucket_elements
    if cluster.generation == "cpu":
        elements = min(elements, local.parameters)
    return elements * system.arriving * (2 if system.overlaps else 1)


def _sent_at_once(layout: Layout, local: Local) -> float:
    """DeepSpeed's ZeRO-1 in bf16 copies fp32 sums into a bucket, and that into one of bf16, after the backward pass."""
    if layout.zero_stage != 1 or layout.precision != "bf16":
        return 0.0
    return (4.0 + layout.system.sent_gradient) * min(local.parameters, layout.system.bucket_elements)


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
