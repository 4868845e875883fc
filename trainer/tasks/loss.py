"""The loss of tasks whose labels are classes at positions: token ids, or the classes of samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from trainer import cross_entropy
from trainer.cross_entropy import SmoothedCrossEntropy, Targets
from trainer.errors import ConfigError
from trainer.tasks import IGNORE, Batch, LossSums


def check_loss(label_smoothing: float, z_loss: float) -> None:
    """Raise ConfigError for a label smoothing outside [0, 1) or a negative z-loss."""
    if not 0.0 <= label_smoothing < 1.0:
        raise ConfigError(f"task.label_smoothing={label_smoothing}: use a number from 0 to below 1.")
    if not 0.0 <= z_loss < float("inf"):
        raise ConfigError(f"task.z_loss={z_loss}: use 0, or a small number such as 1e-4.")


def token_loss(model: Any, batch: Batch, label_smoothing: float = 0.0, z_loss: float = 0.0) -> LossSums:
    """Cross-entropy of what `model` makes of `batch` at the batch's `labels`; see `cross_entropy_sums`.

    A model that `fuses_loss` (see `trainer.models`) computes it in its output head, without whole logits.
    """
    labels = batch["labels"]
    if not getattr(model, "fuses_loss", False):
        return cross_entropy_sums(model(batch), labels, label_smoothing, z_loss)
    objective, nll, num_correct = model(batch, head_loss=Targets(labels, label_smoothing, z_loss)).unbind()
    return LossSums(objective, nll.detach(), (labels != IGNORE).sum(), num_correct.detach().long())


def cross_entropy_sums(
    logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> LossSums:
    """Sums over the positions whose label is not IGNORE; what they are, is told by `trainer.cross_entropy.head_loss`.

    logits: [..., V] floating point of any precision; labels: [...] int64 in [0, V) or IGNORE.
    """
    num_classes = logits.shape[-1]
    flat_labels = labels.reshape(-1)
    needs_gradient = torch.is_grad_enabled() and logits.requires_grad
    objective, nll, num_correct = SmoothedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits.reshape(-1, num_classes), flat_labels, label_smoothing, z_loss, not needs_gradient
    )
    return LossSums(objective, nll, (flat_labels != IGNORE).sum(), num_correct)


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
    on_cpu = logits.device.type == "cpu"
    elements = cross_entropy.CPU_BLOCK_ELEMENTS if on_cpu else cross_entropy.GPU_BLOCK_ELEMENTS
    step = max(1, elements // logits.shape[1])
    for start in range(0, len(logits), step):
        yield slice(start, min(start + step, len(logits)))
