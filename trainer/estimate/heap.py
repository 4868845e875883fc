"""Memory of a CPU process beside its tensors: products that oneDNN compiled, and what glibc keeps (`trainer.host`)."""

from __future__ import annotations

from trainer.estimate import activations
from trainer.estimate.fitted import Fitted
from trainer.estimate.layout import Layout
from trainer.estimate.shape import Shape
from trainer.estimate.terms import Term
from trainer.host import COMPILED_PRODUCTS

GIVEN_BACK_BYTES = 32 << 20
"""A tensor from this size on is memory of its own, which the system has back when it is free; smaller ones are of the
heap, which keeps what is free for the next."""

DEEPSPEED_PIECES_BYTES = 1.2e8
"""Of free memory in pieces that DeepSpeed's imports leave between what they keep in the heap (measured: 283 MB, of
which 147 are in use; without DeepSpeed 127 and 124); steps touch them little by little."""


COMPILED_BYTES = 5e5
"""Of a compiled product (measured: 0.7 MB of a plain one, 0.33 MB of a batched one, as attention has them)."""

LIBRARIES_HEAP_BYTES = 1.5e8
"""Of what a process's libraries take, the part that lies in the heap (measured; the rest are files and mappings)."""


def compiled(shape: Shape, layout: Layout) -> Term:
    """Products in bf16 that oneDNN has compiled at the end of a run: three of each of a layer's matrices and of the
    head, six of attention, for each shape of a batch; how many more shapes there are where batches vary in length is
    measured (840 after 60 micro-batches, 1,290 after 300, 2,190 after 600)."""
    once = 18 * len(activations.stacks(shape, layout)) + (12 if shape.has_cross else 0) + 3
    shapes = min(float(COMPILED_PRODUCTS), max(once, 85.0 * layout.varying_batches**0.5))
    narrow = layout.precision == "bf16"
    return Term(
        "compiled products",
        "device",
        COMPILED_BYTES * shapes if narrow else 0.0,
        "bytes x min(2,048, max(of one shape of a batch, 85 x square root of the micro-batches))"
        if narrow
        else "none: oneDNN does products in bf16",
        {"bytes": COMPILED_BYTES, "of one shape of a batch": once, "micro-batches": layout.varying_batches},
    )


def large(num_bytes: float) -> float:
    """The bytes of a tensor that is memory of its own; 0 of one in the heap."""
    return num_bytes if num_bytes >= GIVEN_BACK_BYTES else 0.0


def kept(
    shape: Shape,
    layout: Layout,
    in_small: float,
    in_large: float,
    gathered: float,
    together: float,
    fitted: Fitted,
) -> Term:
    """Resident memory beyond the bytes of all tensors at the peak (`together`): the most that the heap ever held stays,
    while large tensors have their own peak; and holes in the heap, of no use to the next tensor that is larger. Where
    tensors are of another size in every step, the holes are a part of all that lies in the heap. What ZeRO-3 gathers
    the second time does not find the holes of the first (measured)."""
    if layout.varying_batches:
        return _torn(shape, layout, in_small, in_large, together, fitted)
    hole = largest_small(shape, layout)
    pieces = DEEPSPEED_PIECES_BYTES if layout.zero_stage else 0.0
    return Term(
        "fragmentation",
        "device",
        max(0.0, max(fitted.holes * hole, pieces) + gathered + in_small + in_large - together),
        "max(holes x largest tensor below 32 MiB, pieces that DeepSpeed leaves) + gathered parameters + most in such"
        " tensors + most in larger ones - what is there at the peak",
        {
            "holes": fitted.holes,
            "largest tensor below 32 MiB": hole,
            "pieces": pieces,
            "gathered parameters": gathered,
            "in such tensors": in_small,
            "in larger ones": in_large,
            "at the peak": together,
        },
    )


def _torn(shape: Shape, layout: Layout, in_small: float, in_large: float, together: float, fitted: Fitted) -> Term:
    products = compiled(shape, layout).value
    return Term(
        "fragmentation",
        "device",
        max(0.0, fitted.torn * (in_small + products + LIBRARIES_HEAP_BYTES) + in_small + in_large - together),
        "torn x (most in tensors below 32 MiB + compiled products + of libraries) + most in such tensors + most in"
        " larger ones - what is there at the peak",
        {
            "torn": fitted.torn,
            "in such tensors": in_small,
            "compiled products": products,
            "of libraries": LIBRARIES_HEAP_BYTES,
            "in larger ones": in_large,
            "at the peak": together,
        },
    )


def largest_small(shape: Shape, layout: Layout) -> float:
    """Bytes of the largest tensor of a step that lies in the heap: gradients and states of a token table, logits, a
    feed-forward's hidden units, attention's weights."""
    if shape.other is not None:
        return GIVEN_BACK_BYTES / 2
    width, split = 4.0 if layout.precision == "fp32" else 2.0, layout.sequence * layout.context
    positions = layout.micro_size * (layout.target_length or layout.source_length) / split
    sizes = [width * shape.embedding, width * positions * shape.vocab_size]
    sizes += [] if layout.zero_stage else [4.0 * shape.embedding]
    for stack in activations.stacks(shape, layout):
        hidden = (2 if shape.gated else 1) * shape.d_ff / layout.tensor
        scores = activations.scores_bytes(shape, layout, stack)
        sizes += [width * stack.positions * hidden, width * stack.positions * shape.d_model, scores]
    return max((size for size in sizes if size < GIVEN_BACK_BYTES), default=0.0)
