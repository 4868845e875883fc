"""Bytes of a rank on its device at the peak of a step, and in its host's memory, term by term."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainer.engine.ds_config import bucket_elements
from trainer.estimate import activations, heap
from trainer.estimate.cluster import Cluster
from trainer.estimate.fitted import FITTED, Fitted
from trainer.estimate.layout import Layout
from trainer.estimate.local import Local
from trainer.estimate.shape import Shape
from trainer.estimate.terms import Term

CHUNK_ELEMENTS = 2**25
BLOCK_ELEMENTS = 2**27
"""Of logits, and of fp32 scratch on a GPU, that `trainer.cross_entropy` has at once; the same numbers as there."""

FETCHED_AHEAD = 5e7
"""Elements that ZeRO-3 gathers before they are used: DeepSpeed's `stage3_prefetch_bucket_size`."""

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
    find = _own_moments if layout.system.name == "ours" else _moments
    moments = find(shape, layout, local, cluster)
    peak = max(moments, key=lambda moment: moment.total)
    states = [_without(term, peak.absent) if term.name == "gradients" else term for term in states]
    passing = _passing(shape, layout, local, cluster, peak)
    moving = sum(term.value for term in passing)
    on_cpu = cluster.generation == "cpu"
    losses = [
        *([heap.compiled(shape, layout)] if on_cpu else []),
        _heap(shape, layout, moments, passing, fitted)
        if on_cpu and layout.system.name == "ours"
        else Term(
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
    reduced = stage >= 2 or (stage == 1 and layout.precision == "fp32" and layout.accumulation == 1)
    rows = (
        ("parameters", system.held, n if stage == 3 else 1, layout.offload_parameters == "none"),
        ("masters", trained * system.master, n if stage else 1, not away),
        ("gradients", trained * gradient, n if reduced and not whole else 1, not (away and stage >= 2)),
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


@dataclass(frozen=True, slots=True)
class _Moment:
    """A moment of the step at which the peak may be, by what is there besides states; and how that was computed. large:
    of it, in tensors of `heap.GIVEN_BACK_BYTES` and more; absent: of the states' gradients, those that come later."""

    activations: float
    layer: float = 0.0
    logits: float = 0.0
    arriving: tuple[float, str] = (0.0, "none")
    buffers: tuple[float, str] = (0.0, "none")
    large: float = 0.0
    absent: float = 0.0

    @property
    def passing(self) -> float:
        return self.activations + self.layer + self.logits + self.arriving[0] + self.buffers[0]

    @property
    def total(self) -> float:
        return self.passing - self.absent


def _without(gradients: Term, absent: float) -> Term:
    """The gradients less those that come after the peak."""
    if not absent:
        return gradients
    return replace(gradients, value=gradients.value - absent, formula=f"{gradients.formula}; some come after the peak")


def _heap(shape: Shape, layout: Layout, moments: list[_Moment], passing: list[Term], fitted: Fitted) -> Term:
    """What the C library's heap keeps on a CPU. ZeRO-2's gradients that come after the peak are one large tensor;
    gathered parameters are small ones."""
    absent = [moment.absent if layout.zero_stage == 2 else 0.0 for moment in moments]
    peak = max(range(len(moments)), key=lambda index: moments[index].total)
    together = sum(term.value for term in passing) - absent[peak]
    gathered = next(term.value for term in passing if term.name == "gathered parameters")
    small = gathered + max(moment.passing - moment.large for moment in moments)
    large = max(moment.large - later for moment, later in zip(moments, absent, strict=True))
    return heap.kept(shape, layout, small, large, gathered, together, fitted)


def _passing(shape: Shape, layout: Layout, local: Local, cluster: Cluster, peak: _Moment) -> list[Term]:
    """What comes and goes within a step, at the moment when that is most."""
    gathered, gathered_formula = _gathered(layout, local)
    _, logits_formula = logit_bytes(shape, layout, cluster.generation == "cpu")
    later = "0: the peak is elsewhere in the step"
    elements = {"parameters of the rank": local.parameters, "of a layer": local.layer}
    inputs = {"positions": layout.micro_size * (layout.source_length + layout.target_length)}
    kept = f"layers x bytes that a layer keeps (recompute={layout.recompute}), embeddings"
    sizes = {"elements of a bucket": _bucket(shape, layout, local), "bytes": layout.system.arriving}
    rows: tuple[tuple[str, float, str, dict[str, float]], ...] = (
        ("gathered parameters", gathered, gathered_formula, {"bytes": layout.system.working, **elements}),
        ("buffers of collectives", *peak.buffers, sizes),
        ("arriving gradients", *peak.arriving, {"bytes": layout.system.arriving, **elements}),
        (
            "activations",
            peak.activations,
            kept,
            {**inputs, "layers": float(shape.layers), "d_model": float(shape.d_model)},
        ),
        (
            "activations of a layer",
            peak.layer,
            "one layer computed again, and its gradients" if peak.layer else later,
            inputs,
        ),
        (
            "logits",
            peak.logits,
            logits_formula if peak.logits else later,
            {**inputs, "vocabulary": float(shape.vocab_size), "d_model": float(shape.d_model)},
        ),
    )
    return [Term(name, "device", value, formula, given) for name, value, formula, given in rows]


def _moments(shape: Shape, layout: Layout, local: Local, cluster: Cluster) -> list[_Moment]:
    """The loss, and the backward pass of the layer that needs most."""
    arriving, stored = _arriving(layout, local), _stored(shape, layout)
    arriving = arriving[0] * shape.trained, arriving[1]
    working = activations.working_bytes(shape, layout) if shape.other is None else 0.0
    logits, _ = logit_bytes(shape, layout, cluster.generation == "cpu")
    if layout.pipeline > 1:  # the last stage has the logits, and the first the most micro-batches
        spare = stored * (1 - 1 / min(layout.pipeline, max(1.0, layout.accumulation)))
        logits = max(0.0, logits - spare)
    kept = 0.0 if layout.offload_activations == "cpu" else stored
    buffers = _buffers(layout, local, cluster), "2 buckets of gradients" if layout.zero_stage >= 2 else "none"
    return [_Moment(kept, 0.0, logits, buffers=buffers), _Moment(kept, working, 0.0, arriving, buffers)]


def _own_moments(shape: Shape, layout: Layout, local: Local, cluster: Cluster) -> list[_Moment]:
    """Of our engines: the loss; the backward passes of the head and the last layer; the end of the first layer's; what
    is sent at the end; and the update.

    `launch.planner.count` sees them in DeepSpeed itself: ZeRO-2's bucket comes with the first gradient, ZeRO-3's stays;
    a parameter larger than the bucket is sent by itself; ZeRO-1 in bf16 reduces at the end.
    """
    system, stage, stored, n = layout.system, layout.zero_stage, _stored(shape, layout), layout.zero_ranks
    on_cpu, width = cluster.generation == "cpu", 4.0 if layout.precision == "fp32" else 2.0
    kept = 0.0 if layout.offload_activations == "cpu" else stored
    logits, _ = logit_bytes(shape, layout, on_cpu)
    again = activations.again_bytes(shape, layout) if shape.other is None else 0.0
    outside = activations.embedded_bytes(shape, layout) if shape.other is None else 0.0
    flat = stage == 1 and layout.precision != "fp32"
    bias = activations.bias_bytes(shape, layout) / 2 if layout.recompute != "none" and shape.other is None else 0.0
    later = (2.0 if flat else system.gradient / n if stage == 2 else 0.0) if layout.accumulation == 1 else 0.0
    absent = later * shape.trained * local.parameters
    elements, each = _bucket(shape, layout, local), system.arriving * shape.trained
    table = each * shape.embedding
    bucket = elements * system.arriving if stage and not flat else 0.0
    sent = _sending(shape, layout, local, on_cpu, shape.embedding)
    held = (0.0, "none: they are held")
    head = held if flat else (table, "bytes x parameters of the head")
    last = (each * local.parameters, "bytes x parameters of the rank") if not stage else head if stage > 1 else held
    staying = (bucket, "elements of a bucket x bytes") if stage == 3 else (0.0, "none: they come later")
    sending = (bucket + sent, "(elements of a bucket + of the table, and its copies to be sent) x bytes")
    filling = (
        bucket + _sending(shape, layout, local, on_cpu, elements),
        "elements of a bucket, and its copies, x bytes",
    )
    tables = (1 if shape.tied else 2) * heap.large(table) if not stage else heap.large(table)
    copies = _large_copies(shape, layout, local)
    found = [
        _Moment(kept + bias, 0.0, logits, buffers=staying, large=_large_logits(shape, layout), absent=absent),
        _Moment(kept + width * _head_positions(shape, layout) * shape.d_model, 0.0, 0.0, head,
                (bucket, "elements of a bucket x bytes") if shape.tied else sending,
                heap.large(table) + (0.0 if shape.tied else copies)),
        _Moment(kept, again, 0.0, head if not stage or shape.tied else held, filling, heap.large(bucket)),
        _Moment(outside, again, 0.0, last, sending, tables + copies),
    ]  # fmt: skip
    if flat:
        pieces = (6.0 * min(elements, shape.trained * local.parameters), "(4 + 2) x elements of a bucket")
        found.append(
            _Moment(outside, 0.0, 0.0, held, pieces, pieces[0] if 4 * elements >= heap.GIVEN_BACK_BYTES else 0.0)
        )
    if on_cpu and stage and n > 1:
        found.append(_gathering(shape, layout, local))
    return found


def _gathering(shape: Shape, layout: Layout, local: Local) -> _Moment:
    """Parameters on their way between gloo ranks: what it gathers, it has copied. ZeRO-1 and 2 gather all at the end
    of the step, ZeRO-3 at its beginning as many as it fetches ahead, into one tensor."""
    size = layout.system.working * local.parameters
    if layout.zero_stage < 3:
        size *= shape.trained
        return _Moment(0.0, buffers=(size, "bytes x parameters, which gloo copies"), large=heap.large(size))
    ahead = 2 * min(size, layout.system.working * FETCHED_AHEAD)
    return _Moment(0.0, buffers=(ahead, "2 x bytes x parameters fetched at once"), large=2 * heap.large(ahead / 2))


def _sending(shape: Shape, layout: Layout, local: Local, on_cpu: bool, elements: float) -> float:
    """Of so many gradients, copies while they are sent: ZeRO-2 joins them, and adds its own part as fp32; ZeRO-3 joins
    them; gloo reduces and scatters in a copy of its own."""
    system, stage, n = layout.system, layout.zero_stage, layout.zero_ranks
    joined = system.arriving * shape.trained * elements
    if stage == 2:
        own = min(elements, local.parameters / n)
        return joined + (4.0 * shape.trained * own if system.gradient > system.arriving else 0.0)
    if stage == 3:
        return joined * (1 + (on_cpu and n > 1))
    return joined if stage == 1 and layout.precision == "fp32" else 0.0


def _large_copies(shape: Shape, layout: Layout, local: Local) -> float:
    """Of `_sending` a table, what is large."""
    joined = heap.large(layout.system.arriving * shape.trained * shape.embedding)
    in_fp32 = layout.zero_stage == 2 and layout.system.gradient > layout.system.arriving
    own = 4.0 * shape.trained * min(shape.embedding, local.parameters / layout.zero_ranks)
    return (joined if layout.zero_stage else 0.0) + (heap.large(own) if in_fp32 else 0.0)


def _bucket(shape: Shape, layout: Layout, local: Local) -> float:
    """Elements of the buffer in which ZeRO collects gradients."""
    if not layout.zero_stage or not layout.system.bucket_elements:
        return 0.0
    return min(layout.system.bucket_elements, bucket_elements(shape.trained * local.parameters))


def _large_logits(shape: Shape, layout: Layout) -> float:
    """Of the loss in the output head, the chunk of logits and the gradients where they are large."""
    if shape.other is not None or not shape.vocab_size or shape.classifies or layout.system.head_loss != "fused":
        return 0.0
    width, positions = 4.0 if layout.precision == "fp32" else 2.0, _head_positions(shape, layout)
    chunks = positions * layout.target_fraction * shape.vocab_size > CHUNK_ELEMENTS
    chunk = width * min(positions * layout.target_fraction * shape.vocab_size, CHUNK_ELEMENTS)
    weight = (4.0 if chunks else width) * shape.vocab_size * shape.d_model
    return heap.large(chunk) + heap.large(weight) + heap.large(width * positions * shape.d_model)


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


def _buffers(layout: Layout, local: Local, cluster: Cluster) -> float:
    """DeepSpeed's buckets of gradients, in its own size: one, or two where they overlap with computation. On a CPU,
    pages that are not used take no memory."""
    system = layout.system
    if not layout.zero_stage or not system.bucket_elements:
        return 0.0
    elements = system.bucket_elements
    if cluster.generation == "cpu":
        elements = min(elements, local.parameters)
    return elements * system.arriving * (2 if system.overlaps else 1)


def _head_positions(shape: Shape, layout: Layout) -> float:
    """Of a micro-batch, on one rank, those that the output head reads."""
    length = layout.target_length or layout.source_length
    return 0.0 if shape.other is not None else layout.micro_size * length / (layout.sequence * layout.context)


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
