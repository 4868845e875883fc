from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trainer import cross_entropy
from trainer.tasks import IGNORE
from trainer.tasks.loss import cross_entropy_sums, sequence_log_probs


def make_case(dtype: torch.dtype, num_rows: int = 37, num_classes: int = 101) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = (4 * torch.randn(num_rows, num_classes, generator=generator)).to(dtype)
    labels = torch.randint(0, num_classes, (num_rows,), generator=generator)
    labels[::5] = IGNORE
    labels[1] = logits[1].argmax()
    return logits, labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("block_elements", [1, 500, 2**20])
def test_equals_pytorch_in_fp32(smoothing: float, block_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CPU_BLOCK_ELEMENTS", block_elements)
    logits, labels = make_case(torch.float32)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    sums = cross_entropy_sums(ours, labels, smoothing)
    expected = F.cross_entropy(theirs, labels, label_smoothing=smoothing, reduction="sum", ignore_index=IGNORE)
    (sums.objective / 7).backward()
    (expected / 7).backward()
    torch.testing.assert_close(sums.objective, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(sums.nll, F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE))
    assert not sums.nll.requires_grad
    assert torch.equal(ours.detach(), logits), "the logits themselves must stay as they were"


def test_gradient_of_bf16_logits_is_computed_in_fp32_and_rounded_once() -> None:
    logits, labels = make_case(torch.bfloat16)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    cross_entropy_sums(ours, labels, 0.1).objective.backward()
    F.cross_entropy(theirs.float(), labels, label_smoothing=0.1, reduction="sum", ignore_index=IGNORE).backward()
    assert ours.grad is not None and ours.grad.dtype == torch.bfloat16
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=2**-8, atol=1e-6)


def test_gradient_matches_finite_differences() -> None:
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 4, IGNORE, 2, 2, 1])
    objective = lambda x: cross_entropy_sums(x, labels, 0.2).objective  # noqa: E731
    numeric = torch.zeros_like(logits)
    for index in range(logits.numel()):
        bump = torch.zeros(logits.numel(), dtype=torch.float64)
        bump[index] = 1e-2
        step = bump.view_as(logits)
        numeric.view(-1)[index] = (objective(logits + step) - objective(logits - step)) / 2e-2
    leaf = logits.clone().requires_grad_()
    objective(leaf).backward()
    torch.testing.assert_close(leaf.grad, numeric, rtol=1e-3, atol=1e-3)


def test_counts_only_targets_and_takes_any_leading_shape() -> None:
    logits, labels = make_case(torch.float32, num_rows=40)
    flat = cross_entropy_sums(logits, labels)
    shaped = cross_entropy_sums(logits.view(4, 10, -1), labels.view(4, 10))
    assert flat.num_target_tokens.item() == shaped.num_target_tokens.item() == 32
    correct = ((logits.argmax(-1) == labels) & (labels != IGNORE)).sum().item()
    assert flat.num_correct.item() == shaped.num_correct.item() == correct >= 1


def test_a_tie_counts_as_correct_only_in_training() -> None:
    logits, labels = torch.zeros(3, 4), torch.tensor([0, 1, 2])
    assert cross_entropy_sums(logits, labels).num_correct.item() == 1  # arg max takes the first
    assert cross_entropy_sums(logits.requires_grad_(), labels).num_correct.item() == 3


def test_a_blank_batch_weighs_nothing() -> None:
    logits = torch.randn(5, 8, requires_grad=True)
    sums = cross_entropy_sums(logits, torch.full((5,), IGNORE), 0.1)
    sums.objective.backward()
    assert (sums.objective.item(), sums.nll.item(), sums.num_target_tokens.item(), sums.num_correct.item()) == (
        0,
        0,
        0,
        0,
    )
    assert logits.grad is not None and not logits.grad.any()


def test_huge_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    sums = cross_entropy_sums(logits, torch.tensor([1]), 0.1)
    sums.objective.backward()
    assert sums.nll.item() == pytest.approx(2e4)
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_of_rows_and_their_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to a plain log-softmax, whatever the size of the blocks."""
    monkeypatch.setattr(cross_entropy, "CPU_BLOCK_ELEMENTS", 3 * 7)
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    labels = torch.tensor([[1, 6, IGNORE, 0, 2], [IGNORE, IGNORE, 3, IGNORE, IGNORE]])
    ours = sequence_log_probs(logits, labels)
    each = logits.float().log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    theirs = (each * (labels != IGNORE)).sum(dim=1)
    torch.testing.assert_close(ours, theirs)
    weights = torch.tensor([1.0, -2.0])
    (our_gradient,) = torch.autograd.grad((ours * weights).sum(), logits)
    (their_gradient,) = torch.autograd.grad((theirs * weights).sum(), logits)
    torch.testing.assert_close(our_gradient, their_gradient)
