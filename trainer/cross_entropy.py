"""Cross-entropy summed over target positions: of logits, or of hidden states and the output head that makes them.

The logits of a batch are the largest tensor of a step. Of logits that a model returned, no copy in fp32 is made: rows
pass through one fp32 scratch block that fits the cache, forward keeps only a log-sum-exp per row, and backward repeats
the softmax. With the head's weight in hand (`head_loss`) they never exist as a whole: a chunk of rows at a time becomes
logits, probabilities and gradients in the same memory, and forward leaves the gradients of hidden states and weight,
which backward scales. That is one product of matrices a chunk for logits and one for each gradient, as many as without
chunks; rows that carry no loss take no part in any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

CPU_BLOCK_ELEMENTS = 2**18  # 1 MiB of fp32: fits a core's L2 cache
GPU_BLOCK_ELEMENTS = 2**27  # 512 MiB of fp32: few launches, bounded memory
CHUNK_ELEMENTS = 2**25
"""Of the logits that exist at once under `head_loss`: 256 rows of a vocabulary of 128k, 128 MiB in fp32."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What is expected of a model: labels [...] int64 in [0, V), or negative where a position carries no loss.

    As a `HeadLoss` (see `trainer.models.layers`) it is `head_loss` below.
    """

    labels: Tensor
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return head_loss(hidden, weight, bias, self)


@torch._disable_dynamo  # type: ignore[attr-defined] # torch.compiler.disable would load the compiler for everybody
def head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Targets) -> Tensor:
    """The sums [objective, nll, number correct], fp32 [3], over the positions whose label is not negative.

    hidden [..., d], weight [V, d], bias [V] or None: of one floating dtype; logits are hidden @ weight.T + bias.
    objective: cross-entropy against (1 - e) one_hot(label) + e / V (Szegedy et al. 2016, section 7; the same as
    `torch.nn.functional.cross_entropy(label_smoothing=e)`; fairseq spreads e over the V - 1 *other* classes instead),
    plus z_loss x log(Z)^2, Z the sum of the exponents of a row's logits (PaLM, Chowdhery et al. 2022, section 5); alone
    it has a gradient, once. nll: the plain negative log-likelihood in nats. number correct: how often the label is the
    arg max; where there is a gradient, a label that ties with the maximum counts too, which saves a search.
    On a GPU Liger's kernel does the work where `liger_kernel` is installed and labels are not smoothed (beside a
    smoothed objective it does not tell the nll).
    """
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), targets.labels.reshape(-1)
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if trains and hidden.device.type == "cuda" and not targets.label_smoothing and _has_liger():
        return _liger(flat, weight, bias, labels, targets.z_loss)
    sums: Tensor = _HeadLoss.apply(flat, weight, bias, labels, targets.label_smoothing, targets.z_loss, trains)  # type: ignore[no-untyped-call]
    return sums


class _HeadLoss(torch.autograd.Function):
    """(hidden [N,d], weight [V,d], bias [V] | None, labels [N], smoothing, z_loss, trains) -> sums [3]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        smoothing: float,
        z_loss: float,
        trains: bool,
    ) -> Tensor:
        places = (labels >= 0).nonzero().view(-1)
        num_classes = len(weight)
        rows = max(1, min(_rounded(len(places)), CHUNK_ELEMENTS // num_classes))
        # PyTorch tells what needs a gradient also where none is recorded.
        wants_hidden, wants_weight, wants_bias = (trains and needs for needs in ctx.needs_input_grad[:3])
        hidden_gradient = torch.zeros_like(hidden) if wants_hidden else None
        # Summed over several chunks in fp32, so that what is small is not lost in bf16 beside what is summed already.
        kept_dtype = weight.dtype if len(places) <= rows else torch.float32
        weight_gradient = torch.zeros_like(weight, dtype=kept_dtype) if wants_weight else None
        bias_gradient = torch.zeros(num_classes, device=weight.device) if wants_bias else None
        sums = torch.zeros(3, device=hidden.device)
        buffer = hidden.new_empty(rows, num_classes)
        for chunk in torch.split(places, rows):
            num_rows = min(_rounded(len(chunk)), rows)
            inputs, logits = hidden[_filled(chunk, num_rows)], buffer[:num_rows]
            if bias is None:
                torch.mm(inputs, weight.t(), out=logits)
            else:
                torch.addmm(bias, inputs, weight.t(), out=logits)
            sums += _to_gradients(logits[: len(chunk)], labels[chunk], smoothing, z_loss, trains)
            logits[len(chunk) :] = 0.0
            if hidden_gradient is not None:
                hidden_gradient[chunk] = (logits @ weight)[: len(chunk)]
            if weight_gradient is not None:
                _add_product(weight_gradient, logits, inputs)
            if bias_gradient is not None:
                bias_gradient += logits.sum(0, dtype=torch.float32)
        ctx.gradients = hidden_gradient, weight_gradient, bias_gradient
        ctx.dtype = weight.dtype
        return sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the gradients of a head are given away by the first backward pass"
        own, ctx.gradients = ctx.gradients, None
        scale = gradients[0][0]
        scaled = (None if gradient is None else gradient.mul_(scale).to(ctx.dtype) for gradient in own)
        return *scaled, None, None, None, None


def _rounded(num_rows: int) -> int:
    """The next number of rows that has five binary digits before its zeros: a sixteenth more at most.

    Every batch has another number of targets, and on a CPU oneDNN compiles a product for every shape: 2 to 7 ms each in
    the quick start, three a step.
    """
    step = 1 << max(0, num_rows.bit_length() - 5)
    return -(-num_rows // step) * step


def _filled(places: Tensor, num_rows: int) -> Tensor:
    """`places` [n], and its first one again up to `num_rows`."""
    return torch.cat([places, places[:1].expand(num_rows - len(places))]) if num_rows > len(places) else places


def _add_product(total: Tensor, logits_gradient: Tensor, inputs: Tensor) -> None:
    """total [V,d] += logits_gradient [n,V].T @ inputs [n,d]; `total` may be fp32 where the others are not."""
    if total.dtype == inputs.dtype:
        total.addmm_(logits_gradient.t(), inputs)
        return
    step = max(1, CPU_BLOCK_ELEMENTS * 16 // total.shape[1])  # a few MiB of products at a time
    for part, gradient in zip(torch.split(total, step), torch.split(logits_gradient.t(), step), strict=True):
        part.add_(gradient @ inputs)


def _to_gradients(logits: Tensor, labels: Tensor, smoothing: float, z_loss: float, trains: bool) -> Tensor:
    """The sums [3] of `logits` [n,V] at `labels` [n], none of them negative; leaves in `logits` the objective's
    gradients where it `trains`, and anything elsewhere."""
    sums = torch.zeros(3, device=logits.device)
    for rows, values, _ in fp32_blocks(logits, in_place=True):
        index = labels[rows, None]
        label_logit = values.gather(1, index).squeeze(1)
        if trains:
            top = values.amax(-1)
            correct = top == label_logit
        else:
            top, top_index = values.max(-1)
            correct = top_index == labels[rows]
        mean_logit = values.mean(-1) if smoothing else None
        total = values.sub_(top[:, None]).exp_().sum(-1)
        log_sum = total.log().add_(top)
        nll = log_sum - label_logit
        objective = nll if mean_logit is None else nll + smoothing * (label_logit - mean_logit)
        slope = total.reciprocal()
        if z_loss:
            objective = objective + z_loss * log_sum.square()
            slope *= 1.0 + 2.0 * z_loss * log_sum
        sums += torch.stack([objective.sum(), nll.sum(), correct.sum()])
        if trains:
            values.mul_(slope[:, None])
            if smoothing:
                values.sub_(smoothing / values.shape[1])
            values.scatter_add_(1, index, values.new_full((1, 1), smoothing - 1.0).expand_as(index))
            if values.dtype != logits.dtype:
                logits[rows].copy_(values)
    return sums


@cache
def _has_liger() -> bool:
    from importlib.util import find_spec

    return find_spec("liger_kernel") is not None


def _liger(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, z_loss: float) -> Tensor:
    """`head_loss` by Liger's kernel (Hsu et al. 2024)."""
    from importlib import import_module

    from trainer.tasks import IGNORE

    functional: Any = import_module("liger_kernel.transformers.functional")

    made = functional.liger_fused_linear_cross_entropy(
        hidden,
        weight,
        labels,
        bias,
        ignore_index=IGNORE,
        lse_square_scale=z_loss,
        reduction="sum",
        return_z_loss=True,
        accum_dtype=torch.float32,
        return_token_accuracy=True,
    )
    nll = made.loss.detach() - (made.z_loss.detach() if z_loss else 0.0)
    num_correct = made.token_accuracy.detach() * (labels >= 0).sum()
    return torch.stack([made.loss.float(), nll.float(), num_correct.float()])


class SmoothedCrossEntropy(torch.autograd.Function):
    """(logits [N,V], labels [N], smoothing, z_loss, exact) -> (objective, nll, num_correct), each a scalar; as in
    `head_loss`, which has no use for `exact`: whether the first of several maxima is the arg max."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, smoothing: float, z_loss: float, exact: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        is_target = labels >= 0
        index = labels.clamp(min=0)
        label_logit, top_logit, mean_logit, log_sum = torch.zeros(4, len(labels), device=logits.device).unbind()
        is_top = torch.zeros_like(is_target)
        for rows, values, scratch in fp32_blocks(logits):
            torch.gather(values, 1, index[rows, None], out=label_logit[rows, None])
            if smoothing:
                torch.mean(values, -1, out=mean_logit[rows])
            if exact:
                top, top_index = values.max(-1)
                is_top[rows] = top_index == index[rows]
            else:
                top = values.amax(-1)
                is_top[rows] = top == label_logit[rows]
            top_logit[rows] = top
            torch.sum(torch.sub(values, top[:, None], out=scratch).exp_(), -1, out=log_sum[rows])
        log_sum.log_().add_(top_logit)
        ctx.save_for_backward(logits, labels, log_sum)
        ctx.settings = smoothing, z_loss
        nll = (log_sum - label_logit).masked_fill_(~is_target, 0.0)
        objective = log_sum - (1.0 - smoothing) * label_logit - smoothing * mean_logit if smoothing else nll
        if z_loss:
            objective = objective + z_loss * log_sum.square()
        sums = objective.masked_fill(~is_target, 0.0).sum(), nll.sum(), (is_top & is_target).sum()
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, log_sum = ctx.saved_tensors
        smoothing, z_loss = ctx.settings
        is_target = (labels >= 0).to(log_sum.dtype)
        index = labels.clamp(min=0)
        scale = (gradients[0] * is_target)[:, None]
        label_term = torch.full_like(scale, smoothing - 1.0)
        logits_gradient = torch.empty_like(logits)
        for rows, values, scratch in fp32_blocks(logits):
            gradient = torch.sub(values, log_sum[rows, None], out=scratch).exp_()
            if z_loss:
                gradient.mul_(1.0 + 2.0 * z_loss * log_sum[rows, None])
            if smoothing:
                gradient.sub_(smoothing / logits.shape[1])
            gradient.scatter_add_(1, index[rows, None], label_term[rows])
            logits_gradient[rows].copy_(gradient.mul_(scale[rows]))
        return logits_gradient, None, None, None, None


def fp32_blocks(logits: Tensor, in_place: bool = False) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, their values in fp32, scratch of the same shape) until the rows cover `logits` [N,V].

    The scratch is the same memory every time; the values lie in it, too, unless `logits` are fp32 themselves. in_place:
    these values may be written to, and are all the scratch there is.
    """
    num_rows, num_classes = logits.shape
    elements = CPU_BLOCK_ELEMENTS if logits.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    block_rows = max(1, min(num_rows, elements // num_classes))
    is_fp32 = logits.dtype == torch.float32
    block = torch.empty(0 if is_fp32 and in_place else block_rows, num_classes, device=logits.device)
    for start in range(0, num_rows, block_rows):
        rows = slice(start, min(start + block_rows, num_rows))
        scratch = block[: rows.stop - rows.start]
        yield rows, logits[rows] if is_fp32 else scratch.copy_(logits[rows]), scratch
