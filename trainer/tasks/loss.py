"""The loss of tasks whose labels are classes at positions: token ids, or the classes of samples."""

from __future__ import annotations

from typing import Any

import torch

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
