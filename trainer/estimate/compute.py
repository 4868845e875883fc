"""Seconds of computation of one micro-batch on one rank: products of matrices, attention, what passes over memory."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.estimate.activations import Stack, stacks
from trainer.estimate.cluster import Cluster
from trainer.estimate.fitted import Fitted
from trainer.estimate.layout import Layout
from trainer.estimate.shape import Shape

POWER = 0.5
"""Sustained rate grows with the square root of the power a device is allowed."""

LOGIT_PASSES = {"fused": 24.0, "kernel": 14.0, "compiled": 14.0, "eager": 46.0}
"""Bytes that forward and backward of the loss read and write for a logit in bf16: by the operations that each makes."""

FLASH_BACKWARD = 2.5
"""Work of the backward pass of a fused attention kernel for that of its forward pass: five products for two."""


@dataclass(frozen=True, slots=True)
class Compute:
    """Seconds of one micro-batch of all layers (of one pipeline stage: divide), and of the head once."""

    products: float
    attention: float
    passes: float
    recomputing: float
    head: float


class Rates:
    """What a device does in a second, in one precision."""

    def __init__(self, layout: Layout, cluster: Cluster, fitted: Fitted) -> None:
        generation, system = cluster.generation, layout.system
        share: float = cluster.power_share**POWER
        peaks = cluster.peak_flops
        self.fp8 = system.fp8 and "fp8" in peaks
        self.width = 4.0 if layout.precision == "fp32" else 2.0
        self.peak = peaks.get(layout.precision, peaks["fp32"])
        early = generation == "hopper" and system.early_hopper
        products = fitted.products["hopper early" if early else generation]
        self.per_flop = 1 / (peaks["fp8" if self.fp8 else layout.precision] * products * share)
        self.per_byte = 1 / (cluster.memory_bandwidth * fitted.bandwidth)
        family = f"{system.attention} {generation}"
        rate = fitted.attention.get(family, fitted.attention.get(f"flash {generation}", 0.3))
        self.per_attention_flop = 1 / (self.peak * share * rate)
        self.per_plain_flop = 1 / (self.peak * share * products)
        self.eager = (1.0 if system.compiled else fitted.eager) * (2.0 if system.autocast else 1.0)

    def product(self, rows: float, inner: float, columns: float) -> float:
        """Seconds of [rows, inner] x [inner, columns]: its operations, and reading and writing the three matrices."""
        numbers = rows * inner + inner * columns + rows * columns
        each = self.width
        if self.fp8:
            each += 2.5  # the largest value is sought and numbers are cast: 5 bytes of each factor
        return 2 * rows * inner * columns * self.per_flop + each * numbers * self.per_byte


def products_seconds(shape: Shape, layout: Layout, stack: Stack, rates: Rates) -> tuple[float, float]:
    """Forward products of one layer: all, and the last one alone."""
    t, d, m = layout.tensor, shape.d_model, stack.positions
    query, kv, hidden = shape.query_size / t, shape.kv_size / t, shape.d_ff / t
    total = rates.product(m, d, query + 2 * kv) + rates.product(m, query, d)
    total += (2 if shape.gated else 1) * rates.product(m, d, hidden)
    last = rates.product(m, hidden, d)
    if stack.memory:
        total += 2 * rates.product(m, d, query) + rates.product(stack.memory_positions, d, 2 * query)
    return total + last, last


def attention_seconds(shape: Shape, layout: Layout, stack: Stack, rates: Rates) -> tuple[float, float]:
    """One layer's attention, forward and backward: 4 operations a pair of positions and number of a head.

    Fused kernels leave out pairs that causality hides. Plain attention writes and reads the pairs' weights instead:
    scores, softmax and dropout, 6 times forward and 9 backward.
    """
    query = shape.query_size / layout.tensor
    if layout.system.attention != "unfused":
        pairs = stack.positions * (stack.length * (0.5 if stack.causal else 1.0) + stack.memory)
        forward = 4 * pairs * query * rates.per_attention_flop
        return forward, FLASH_BACKWARD * forward
    pairs = stack.positions * (stack.length + stack.memory)
    work = 4 * pairs * query * rates.per_plain_flop
    width = 4.0 if layout.system.autocast else rates.width
    weights = width * pairs * shape.num_heads / layout.tensor * rates.per_byte
    return work + 6 * weights, 2 * work + 9 * weights


def passes_seconds(shape: Shape, layout: Layout, stack: Stack, rates: Rates) -> float:
    """Forward passes over memory of one layer: norms read and write, sums read two and write one, activations, rotary
    positions, dropout."""
    t, parts = layout.tensor, 3 if stack.memory else 2
    d = shape.d_model / t if layout.system.sequence_norms else shape.d_model
    numbers = parts * (2 + 3 + (2 if shape.dropout else 0)) * d
    numbers += (3 if shape.gated else 2) * shape.d_ff / t
    numbers += 2 * (shape.query_size + shape.kv_size) / t if shape.rotary else 0.0
    return rates.width * stack.positions * numbers * rates.per_byte * rates.eager


def computing(shape: Shape, layout: Layout, cluster: Cluster, fitted: Fitted) -> Compute:
    """All of a micro-batch on one rank, the layers of all pipeline stages together."""
    rates = Rates(layout, cluster, fitted)
    if shape.other is not None:
        numbers = shape.other.activations * layout.micro_size * rates.width * rates.per_byte
        return Compute(shape.other.flops * layout.micro_size * rates.per_plain_flop, 0.0, 3 * numbers, 0.0, 0.0)
    products = attention = passes = again = 0.0
    for stack in stacks(shape, layout):
        product, last = products_seconds(shape, layout, stack, rates)
        forward, backward = attention_seconds(shape, layout, stack, rates)
        over = passes_seconds(shape, layout, stack, rates)
        products += stack.layers * (2 + shape.trained) * product
        attention += stack.layers * (forward + backward)
        passes += stack.layers * 3 * over
        again += stack.layers * _again(layout, product, last, forward, over)
    return Compute(products, attention, passes, again, head_seconds(shape, layout, rates))


def _again(layout: Layout, product: float, last: float, attention: float, over: float) -> float:
    """What one layer computes a second time."""
    system = layout.system
    if layout.recompute == "full":
        return (product + attention + over - (last if system.early_stop else 0.0)) / layout.recompute_every
    if layout.recompute == "selective":
        if system.selective == "attention":
            return attention
        return over + (product / 2 if system.selective == "half" else 0.0)
    return 0.0


def head_seconds(shape: Shape, layout: Layout, rates: Rates) -> float:
    """The output head's three products and the passes over logits."""
    if not shape.vocab_size or shape.classifies:
        return 0.0
    length = layout.target_length or layout.source_length
    positions = layout.micro_size * length * layout.target_fraction / (layout.sequence * layout.context)
    vocabulary = shape.vocab_size / (layout.tensor if layout.system.splits_vocabulary == "logits" else 1)
    passes = LOGIT_PASSES[layout.system.head_loss] * positions * vocabulary * rates.per_byte
    plain = 2 * positions * shape.d_model * vocabulary * rates.per_plain_flop
    return 3 * plain + passes


def model_flops(shape: Shape, layout: Layout) -> float:
    """Forward and backward of a step, all ranks: 6 x matrix parameters x positions (Kaplan et al. 2020), attention over
    all pairs (PaLM, appendix B)."""
    samples = layout.global_size
    if shape.other is not None:
        return shape.other.flops * samples
    total = 0.0
    source = layout.source_length / shape.source_divisor
    if shape.encoder_layers:
        total += shape.encoder_layers * source * (6 * shape.layer_matrices(False) + 12 * shape.query_size * source)
    if shape.decoder_layers:
        target, cross = layout.target_length, shape.has_cross
        memory = source if cross else 0.0
        keys = 2 * shape.d_model * shape.query_size if cross else 0
        at_target = 6 * (shape.layer_matrices(cross) - keys) * target + 6 * keys * memory
        total += shape.decoder_layers * (at_target + 12 * shape.query_size * target * (target + memory))
    if not shape.classifies:
        total += 6 * shape.embedding * (layout.target_length or source) * layout.target_fraction
    return total * samples
