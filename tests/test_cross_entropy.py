"""The loss computed by the output head: that of whole logits, without them."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bench.recompute import LiveBytes

from trainer import cross_entropy
from trainer.cross_entropy import Targets
from trainer.models.decoder import Decoder
from trainer.models.encoder_decoder import EncoderDecoder
from trainer.models.mlp import MLP
from trainer.tasks import IGNORE
from trainer.tasks.loss import cross_entropy_sums, token_loss


def case(rows=45, classes=203, size=16, dtype=torch.float32, seed=3):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, size, generator=generator).to(dtype)
    weight = torch.randn(classes, size, generator=generator).to(dtype)
    bias = torch.randn(classes, generator=generator).to(dtype)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    labels[::5] = IGNORE
    return hidden, weight, bias, labels


def formula(hidden, weight, bias, labels, smoothing=0.0, z_loss=0.0):
    """Plain autograd, in the dtype of its arguments."""
    logits = F.linear(hidden, weight, bias)
    z = logits[labels != IGNORE].logsumexp(-1).square().sum()
    options = {"reduction": "sum", "ignore_index": IGNORE, "label_smoothing": smoothing}
    return F.cross_entropy(logits, labels, **options) + z_loss * z


def learn(loss, *tensors, scale=1 / 7):
    leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in tensors]
    objective = loss(*leaves)
    (objective * scale).backward()
    return objective.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.1, 1e-2), (0.0, 1e-4)])
@pytest.mark.parametrize("chunk", [1, 203 * 7, 2**26])
@pytest.mark.parametrize("biased", [True, False])
def test_loss_and_gradients_are_those_of_the_formula(monkeypatch, smoothing, z_loss, chunk, biased):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk)
    hidden, weight, bias, labels = case()
    bias = bias if biased else None
    ours = learn(lambda *head: Targets(labels, smoothing, z_loss)(*head)[0], hidden, weight, bias)
    doubles = (None if tensor is None else tensor.double() for tensor in (hidden, weight, bias))
    exact = learn(lambda *head: formula(*head, labels, smoothing, z_loss), *doubles)
    for own, true in zip(ours, exact, strict=True):
        if true is not None:
            assert float((own - true).abs().max() / true.abs().max()) < 1e-6


def test_any_number_of_targets_makes_products_of_few_shapes(monkeypatch):
    """Each shape is compiled on a CPU: 400 numbers of targets have a few dozen, and at most a sixteenth of filling."""
    mm, shapes = torch.mm, set()

    def seen(inputs, weight, out):
        shapes.add(len(inputs))
        return mm(inputs, weight, out=out)

    monkeypatch.setattr(torch, "mm", seen)
    for rows in range(400):
        hidden, weight, _, labels = case(rows, classes=11, size=4)
        ours = learn(lambda *head, labels=labels: Targets(labels)(*head, None)[0], hidden, weight)
        exact = learn(lambda *head, labels=labels: formula(*head, None, labels), hidden.double(), weight.double())
        for own, true in zip(ours, exact, strict=True):
            torch.testing.assert_close(own.double(), true, rtol=1e-5, atol=1e-5)
        assert max(shapes) <= max(32, rows * 17 / 16)
    assert len(shapes) < 32 + 16 * 4


def test_chunks_of_a_bf16_gradient_are_summed_in_fp32(monkeypatch):
    """So that many chunks are as exact as one, whose products are summed in fp32 by the matrix kernel."""
    hidden, weight, _, labels = case(rows=600, dtype=torch.bfloat16)
    _, _, exact = learn(lambda h, w: formula(h, w, None, labels), hidden.float(), weight.float())
    errors = []
    for chunk in (2**26, 203 * 4):
        monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk)
        loss, _, gradient = learn(lambda h, w: Targets(labels)(h, w, None)[0], hidden, weight)
        assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
        errors.append(float((gradient.float() - exact).norm() / exact.norm()))
    assert errors[1] < 1.2 * errors[0]


def test_without_a_gradient_the_first_of_several_maxima_is_the_answer():
    hidden, weight = torch.zeros(3, 4), torch.ones(5, 4)
    labels = torch.tensor([0, 1, IGNORE])
    with torch.inference_mode():
        sums = Targets(labels)(hidden, weight, None)
    assert not sums.requires_grad and sums[2] == 1
    assert Targets(labels)(hidden.requires_grad_(), weight, None)[2] == 2


def test_evaluation_computes_no_gradient(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_add_product", None)
    hidden, weight, bias, labels = case()
    with torch.no_grad():
        Targets(labels)(hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_())


def test_frozen_parts_get_no_gradient():
    hidden, weight, bias, labels = case()
    whole = learn(lambda *head: Targets(labels)(*head)[0], hidden, weight, bias)
    kept = hidden.clone().requires_grad_()
    (Targets(labels)(kept, weight, bias)[0] / 7).backward()
    torch.testing.assert_close(kept.grad, whole[1], rtol=0, atol=0)
    head = weight.clone().requires_grad_()
    (Targets(labels)(hidden, head, bias)[0] / 7).backward()
    torch.testing.assert_close(head.grad, whole[2], rtol=0, atol=0)


def test_positions_without_labels_weigh_nothing():
    hidden, weight, bias, labels = case()
    sums, *gradients = learn(lambda *head: Targets(labels.fill_(IGNORE), 0.1, 1.0)(*head)[0], hidden, weight, bias)
    assert sums == 0 and not any(bool(gradient.any()) for gradient in gradients)


def test_peak_memory_is_a_small_part_of_logits_and_their_gradient(monkeypatch):
    """8k tokens of a vocabulary of 128k in small: rows, classes and chunk divided alike."""
    rows, classes, size = 512, 8192, 8
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", cross_entropy.CHUNK_ELEMENTS * rows * classes // 2**30)
    hidden, weight, _, labels = case(rows, classes, size)
    hidden.requires_grad_(), weight.requires_grad_()
    labels.clamp_(min=0)
    with LiveBytes() as live:
        live.seen |= {tensor.untyped_storage()._cdata for tensor in (hidden, weight)}
        Targets(labels, 0.1, 1e-4)(hidden, weight, None)[0].backward()
    kept = (hidden.numel() + weight.numel()) * 4
    assert live.peak - kept < 2 * rows * classes * 4 / 32


MODELS = {
    "tied": (EncoderDecoder, {"head_bias": True}),
    "scaled": (EncoderDecoder, {"scale_embeddings": False}),
    "untied": (EncoderDecoder, {"tie_embeddings": False, "head_bias": True, "norm_position": "post"}),
    "decoder": (Decoder, {}),
    "tied decoder": (Decoder, {"tie_embeddings": True}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_models_head_computes_the_loss_of_its_logits(name):
    kind, options = MODELS[name]
    layers = {"num_layers": 1} if kind is Decoder else {"encoder_layers": 1, "decoder_layers": 1}
    model = kind(50, d_model=16, num_heads=2, d_ff=32, **layers, **options).eval()
    model.reset_parameters(torch.Generator().manual_seed(1))
    ids = torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(2))
    labels = ids.roll(1, dims=1)
    labels[0, 4:] = IGNORE
    batch = {"source_ids": ids, "source_mask": torch.ones_like(ids).bool(), "decoder_input_ids": ids, "labels": labels}
    batch["input_ids"] = ids
    made = []
    for sums in (token_loss(model, batch, 0.1, 1e-3), cross_entropy_sums(model(batch), labels, 0.1, 1e-3)):
        model.zero_grad()
        sums.objective.backward()
        facts = sums.objective.detach(), sums.nll, sums.num_target_tokens, sums.num_correct
        made.append((facts, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}))
    assert not sums.nll.requires_grad and made[0][0][3].dtype == torch.int64
    torch.testing.assert_close(made[0], made[1], rtol=1e-5, atol=1e-6)


def test_a_model_that_knows_nothing_of_it_is_asked_for_logits():
    batch = {"inputs": torch.randn(4, 6), "labels": torch.tensor([0, 1, 2, 1])}
    model = MLP(input_size=6, num_classes=3)
    model.reset_parameters(torch.Generator().manual_seed(1))
    expected = F.cross_entropy(model(batch), batch["labels"], reduction="sum")
    torch.testing.assert_close(token_loss(model.eval(), batch).nll, expected)


def test_ligers_answer_is_read(monkeypatch):
    """Its kernels need a GPU: here a stand-in with its signature, computed by the formula."""

    def stand_in(hidden, weight, labels, bias, *, ignore_index, lse_square_scale, reduction, **options):
        assert (ignore_index, reduction, options["accum_dtype"]) == (IGNORE, "sum", torch.float32)
        loss = formula(hidden, weight, bias, labels, 0.0, lse_square_scale)
        z_loss = loss - formula(hidden, weight, bias, labels)
        right = F.linear(hidden, weight, bias).argmax(-1) == labels
        return SimpleNamespace(loss=loss, z_loss=z_loss, token_accuracy=right.sum() / (labels != IGNORE).sum())

    module = ModuleType("liger_kernel.transformers.functional")
    module.liger_fused_linear_cross_entropy = stand_in
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for package in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    hidden, weight, bias, labels = case()
    labels[1] = F.linear(hidden, weight, bias)[1].argmax()
    ours = Targets(labels, 0.0, 1e-2)(hidden.requires_grad_(), weight, bias)
    theirs = cross_entropy._liger(hidden, weight, bias, labels, 1e-2)
    torch.testing.assert_close(theirs, ours)
    assert theirs[2] >= 1
