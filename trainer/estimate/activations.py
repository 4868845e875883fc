"""What the backward pass needs of the forward pass: numbers a position and layer, by what is recomputed.

Counted from what autograd keeps of `trainer.models`, which for a GPT agrees with Korthikanti et al. 2022 (equations 1
and 2, table 2): there, 34 bytes x positions x d_model a layer with dropout, and 5 x heads x length^2 for plain
attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.estimate.layout import Layout
from trainer.estimate.shape import Shape

SHORT = 512
"""Keys up to which attention is plain on a CPU in bf16; the same number as in `trainer.models.attention`."""


@dataclass(frozen=True, slots=True)
class Stack:
    """One stack of a micro-batch on one rank. positions: of all its samples; length: of one; memory: positions of the
    encoder that one sample's cross-attention reads, 0 without."""

    layers: int
    positions: float
    length: float
    memory: float
    causal: bool

    @property
    def memory_positions(self) -> float:
        """Of the encoder, of all samples."""
        return self.positions / self.length * self.memory if self.length else 0.0


def stacks(shape: Shape, layout: Layout) -> list[Stack]:
    """The encoder and the decoder of a micro-batch; positions are those of one rank."""
    split = layout.sequence * layout.context
    source = layout.source_length / shape.source_divisor
    found = []
    if shape.encoder_layers:
        found.append(Stack(shape.encoder_layers, layout.micro_size * source / split, source, 0.0, False))
    if shape.decoder_layers:
        memory = source if shape.has_cross else 0.0
        positions = layout.micro_size * layout.target_length / split
        found.append(Stack(shape.decoder_layers, positions, layout.target_length, memory, True))
    return found


def kept_bytes(shape: Shape, layout: Layout, stack: Stack, mode: str) -> float:
    """Bytes that one layer of the stack keeps of a micro-batch under recomputing `mode` ("none" keeps all)."""
    width = 4.0 if layout.precision == "fp32" else 2.0
    d, t, masks = shape.d_model, layout.tensor, shape.dropout > 0
    query, kv, hidden = shape.query_size / t, shape.kv_size / t, shape.d_ff / t
    between = d / t if layout.system.sequence_norms else d
    cross = stack.memory > 0
    if mode == "full":  # keys and values of cross-attention are made of the memory before the layer runs
        return width * (stack.positions * between + (2 * query * stack.memory_positions if cross else 0.0))
    statistics = 4.0 * shape.num_heads / t * (2 if cross else 1)
    if mode == "operations":  # the layer's input, and results of products and attention
        numbers = between + (query + 2 * kv) + query + between + (2 if shape.gated else 1) * hidden + between
        numbers += (2 * query + between) if cross else 0.0
        memory = 2 * query * stack.memory_positions if cross else 0.0
        return width * (stack.positions * numbers + memory) + stack.positions * statistics
    if mode == "half":  # every second product is computed again: keys, output, one of the gated pair
        numbers = between + query + kv + query + hidden + between
        return width * stack.positions * numbers + stack.positions * statistics
    residual = 4 * between  # inputs and outputs of two norms
    attention = query + 2 * kv + (query + kv if shape.rotary and layout.system.fused_projection else 0.0) + query
    feed_forward = shape.hidden_kept * hidden
    numbers = residual + attention + feed_forward
    numbers += (2 * between if masks else 0.0) + (hidden if masks and shape.relative else 0.0)
    memory = 0.0
    if cross:
        numbers += 2 * between + 2 * query + (between if masks else 0.0)
        memory = 2 * query * stack.memory_positions
    total = width * (stack.positions * numbers + memory) + stack.positions * statistics
    return total + (scores_bytes(shape, layout, stack) if mode != "attention" else 0.0)


def scores_bytes(shape: Shape, layout: Layout, stack: Stack) -> float:
    """Of plain attention's weights and their dropout; fused kernels keep none.

    On a CPU, PyTorch's fused kernel is left where there is dropout, a bias with a gradient (T5's), or, in bf16, few
    keys (`trainer.models.attention.attend`).
    """
    kind, narrow = layout.system.attention, layout.precision != "fp32"
    if kind not in ("unfused", "cpu"):
        return 0.0
    dropped = shape.attention_dropout > 0
    keys = stack.length + stack.memory
    if kind == "cpu" and not dropped:
        own = stack.length if shape.relative or (narrow and stack.length <= SHORT) else 0.0
        keys = own + (stack.memory if narrow and stack.memory <= SHORT else 0.0)
    width = 2.0 if narrow else 4.0
    a_pair = width + ((2 * width if kind == "cpu" else width + 1.0) if dropped else 0.0)
    return a_pair * shape.num_heads / layout.tensor / layout.sequence * stack.positions * keys


def bias_bytes(shape: Shape, layout: Layout) -> float:
    """T5's bias of one stack with what hides padding added to it, and its gradient: [samples, heads, length, length]
    each."""
    if not shape.relative:
        return 0.0
    width = 4.0 if layout.precision == "fp32" else 2.0
    longest = max((stack.positions * stack.length for stack in stacks(shape, layout)), default=0.0)
    return 2 * width * shape.num_heads / layout.tensor / layout.sequence * longest


def stored_bytes(shape: Shape, layout: Layout) -> float:
    """Of all layers that a rank holds at the end of the forward pass.

    A pipeline's first stage holds as many micro-batches as there are stages (1F1B, Narayanan et al. 2021, section 2.2),
    and with interleaved stages (1 + (stages - 1) / (stages x interleave)) times as much.
    """
    total = 0.0
    for stack in stacks(shape, layout):
        own = stack.layers / layout.pipeline
        if layout.recompute == "none":
            total += own * kept_bytes(shape, layout, stack, "none")
        elif layout.recompute == "selective":
            total += own * kept_bytes(shape, layout, stack, layout.system.selective)
        else:
            again = own / layout.recompute_every
            total += again * kept_bytes(shape, layout, stack, "full")
            total += (own - again) * kept_bytes(shape, layout, stack, "none")
    if layout.pipeline > 1:
        in_flight = min(layout.pipeline, layout.accumulation)
        if layout.interleave > 1:
            in_flight *= 1 + (layout.pipeline - 1) / (layout.pipeline * layout.interleave)
        total *= in_flight
    return total


def working_bytes(shape: Shape, layout: Layout) -> float:
    """Of the layer whose backward pass runs: what is computed again, and gradients, half as large as what it keeps."""
    largest = max((kept_bytes(shape, layout, stack, "none") for stack in stacks(shape, layout)), default=0.0)
    again = largest if layout.recompute != "none" else 0.0
    return again + 0.5 * largest + bias_bytes(shape, layout)


def again_bytes(shape: Shape, layout: Layout) -> float:
    """Of the layer that the backward pass computes again: what it keeps, but for what was kept already."""
    if layout.recompute == "none":
        return bias_bytes(shape, layout) / 2
    mode = layout.system.selective if layout.recompute == "selective" else "full"
    largest = max(
        (kept_bytes(shape, layout, s, "none") - kept_bytes(shape, layout, s, mode) for s in stacks(shape, layout)),
        default=0.0,
    )
    return largest + bias_bytes(shape, layout)


def embedded_bytes(shape: Shape, layout: Layout) -> float:
    """Outside the layers: embedded sequences, final norms, and the hidden states that the head reads; of a masked
    language model also its dense layer, the activation and the norm before the head."""
    width = 4.0 if layout.precision == "fp32" else 2.0
    transforms = shape.vocab_size > 0 and not shape.decoder_layers and not shape.classifies
    return (6 if transforms else 3) * width * shape.d_model * sum(stack.positions for stack in stacks(shape, layout))
