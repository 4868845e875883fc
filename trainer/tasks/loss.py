"""Cross-entropy with label smoothing, summed over target positions: fast on a CPU, thrifty with memory anywhere.

The logits of a batch are the largest tensor of a step. Here they are never copied to fp32 as a whole: rows pass through
one fp32 scratch block that fits the cache, forward keeps only a log-sum-exp per row, and backward repeats the softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from trainer.tasks import IGNORE, Batch, LossSums

CPU_BLOCK_ELEMENTS = 2**18  # 1 MiB of fp32: fits a core's L2 cache
GPU_BLOCK_ELEMENTS = 2**27  # 512 MiB of fp32: few launches, bounded memory


def token_loss(model: Any, batch: Batch, label_smoothing: float = 0.0) -> LossSums:
    """`cross_entropy_sums` of what `model` makes of `batch`, at the batch's `labels`."""
    return cross_entropy_sums(model(batch), batch["labels"], label_smoothing)


def cross_entropy_sums(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> LossSums:
    """Sums over the positions whose label is not IGNORE.

    logits: [..., V] floating point of any precision; labels: [...] int64 in [0, V) or IGNORE.
    objective: cross-entropy against (1 - e) one_hot(label) + e / V (Szegedy et al. 2016, section 7; the same as
    `torch.nn.functional.cross_entropy(label_smoothing=e)`; fairseq spreads e over the V - 1 *other* classes instead).
    num_correct: without gradient, how often the label is the arg max; with gradient (in training) a label that ties
    with the maximum counts too, which saves a search over the logits.
    """
    num_classes = logits.shape[-1]
    flat_labels = labels.reshape(-1)
    needs_gradient = torch.is_grad_enabled() and logits.requires_grad
    objective, nll, num_correct = _SmoothedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits.reshape(-1, num_classes), flat_labels, label_smoothing, not needs_gradient
    )
    return LossSums(objective, nll, (flat_labels != IGNORE).sum(), num_correct)


class _SmoothedCrossEntropy(torch.autograd.Function):
    """(logits [N,V], labels [N], smoothing, exact) -> (objective, nll, num_correct), each a scalar."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, smoothing: float, exact: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        is_target = labels != IGNORE
        index = labels.clamp(min=0)
        label_logit, top_logit, mean_logit, log_sum = torch.zeros(4, len(labels), device=logits.device).unbind()
        is_top = torch.zeros_like(is_target)
        for rows, values, scratch in _fp32_blocks(logits):
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
        ctx.smoothing = smoothing
        nll = (log_sum - label_logit).masked_fill_(~is_target, 0.0)
        objective = log_sum - (1.0 - smoothing) * label_logit - smoothing * mean_logit if smoothing else nll
        sums = objective.masked_fill(~is_target, 0.0).sum(), nll.sum(), (is_top & is_target).sum()
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, labels, log_sum = ctx.saved_tensors
        is_target = (labels != IGNORE).to(log_sum.dtype)
        index = labels.clamp(min=0)
        scale = (gradients[0] * is_target)[:, None]
        label_term = torch.full_like(scale, ctx.smoothing - 1.0)
        logits_gradient = torch.empty_like(logits)
        for rows, values, scratch in _fp32_blocks(logits):
            gradient = torch.sub(values, log_sum[rows, None], out=scratch).exp_()
            if ctx.smoothing:
                gradient.sub_(ctx.smoothing / logits.shape[1])
            gradient.scatter_add_(1, index[rows, None], label_term[rows])
            logits_gradient[rows].copy_(gradient.mul_(scale[rows]))
        return logits_gradient, None, None, None


def _fp32_blocks(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """(rows, their values in fp32, scratch of the same shape) until the rows cover `logits` [N,V].

    The scratch is the same memory every time; the values lie in it, too, unless `logits` are fp32 themselves.
    """
    num_rows, num_classes = logits.shape
    elements = CPU_BLOCK_ELEMENTS if logits.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    block_rows = max(1, min(num_rows, elements // num_classes))
    block = torch.empty(block_rows, num_classes, device=logits.device)
    for start in range(0, num_rows, block_rows):
        rows = slice(start, min(start + block_rows, num_rows))
        scratch = block[: rows.stop - rows.start]
        yield rows, logits[rows] if logits.dtype == torch.float32 else scratch.copy_(logits[rows]), scratch


def sequence_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[B] fp32: the log-probability in nats of each row's labels together, IGNORE left out.

    logits: [B,T,V] floating point of any precision; labels: [B,T] int64. The gradient repeats the softmax block by
    block, as above, so that nothing of the logits' size is kept.
    """
    each = _LabelLogProbs.apply(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))  # type: ignore[no-untyped-call]
    return each.view(labels.shape).sum(dim=1)  # type: ignore[no-any-return]


class _LabelLogProbs(torch.autograd.Function):
    """(logits [N,V], labels [N]) -> log-probability of each label [N] fp32, 0 for IGNORE."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        is_target, index = labels != IGNORE, labels.clamp(min=0)
        log_sum = torch.empty(len(labels), device=logits.device)
        for rows in _row_blocks(logits):
            torch.logsumexp(logits[rows].float(), dim=-1, out=log_sum[rows])
        ctx.save_for_backward(logits, labels, log_sum)
        chosen = logits.gather(1, index[:, None])[:, 0].float()
        return (chosen - log_sum).masked_fill_(~is_target, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, labels, log_sum = ctx.saved_tensors
        scale = (gradients[0] * (labels != IGNORE))[:, None]
        logits_gradient = torch.empty_like(logits)
        for rows in _row_blocks(logits):
            gradient = torch.sub(logits[rows].float(), log_sum[rows, None]).exp_().neg_()
            gradient.scatter_add_(1, labels[rows].clamp(min=0)[:, None], torch.ones_like(scale[rows]))
            logits_gradient[rows] = gradient.mul_(scale[rows]).to(logits.dtype)
        return logits_gradient, None


def _row_blocks(logits: torch.Tensor) -> Iterator[slice]:
    """Slices of the rows of logits [N,V], each so small that its copy in fp32 is cheap."""
    elements = CPU_BLOCK_ELEMENTS if logits.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    step = max(1, elements // logits.shape[1])
    for start in range(0, len(logits), step):
        yield slice(start, min(start + step, len(logits)))
