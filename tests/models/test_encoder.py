"""BERT's encoder: padding, packed rows, initial values, work, and shapes that cannot be."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.errors import ConfigError
from trainer.models.encoder import Encoder


def build(**options):
    shape = {"d_model": 32, "num_heads": 4, "d_ff": 64, "num_layers": 2, "max_positions": 12}
    model = Encoder(50, **{**shape, "init_std": 0.2, **options})
    model.reset_parameters(torch.Generator().manual_seed(0))
    return model.eval()


CLASSIFIER = {"head": "classification", "num_classes": 3}


def make_ids(size=3, length=9, seed=1):
    return torch.randint(0, 50, (size, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("head", [{}, CLASSIFIER, {"head": "none"}], ids=["masked_lm", "classification", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_changes_nothing_and_gives_no_nan(head, dtype):
    model, ids = build(**head).to(dtype), make_ids(2, 6)
    mask = torch.arange(10) < torch.tensor([[6], [6], [0]])  # a blank row, as ranks without samples have
    padded = torch.nn.functional.pad(ids, (0, 4, 0, 1))
    logits = model({"input_ids": padded, "attention_mask": mask})
    logits.float().sum().backward()
    assert all(one.grad.isfinite().all() for one in model.parameters() if one.grad is not None)
    expected, tolerance = model({"input_ids": ids}), 1e-5 if dtype == torch.float32 else 3e-2
    found = logits[:2] if logits.dim() == 2 else logits[:2, :6]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_every_token_sees_both_sides():
    model, ids = build(), make_ids(1)
    with torch.inference_mode():
        before = model({"input_ids": ids})
        for place in (0, 8):
            changed = ids.clone()
            changed[0, place] = (changed[0, place] + 1) % 50
            assert not torch.isclose(model({"input_ids": changed})[0, 4], before[0, 4], atol=1e-4).all()


def test_samples_of_a_row_are_kept_apart():
    """A row may be longer than the positions that the model knows."""
    model, lengths = build(), (5, 7, 2)
    ids = make_ids(1, 16)
    segments = torch.tensor([[1] * 5 + [2] * 7 + [3] * 2 + [0] * 2])
    positions = torch.cat([torch.arange(length) for length in (*lengths, 2)])[None]
    with torch.inference_mode():
        packed = model({"input_ids": ids, "segment_ids": segments, "position_ids": positions})
        for start, length in zip((0, 5, 12), lengths, strict=True):
            place = slice(start, start + length)
            alone = model({"input_ids": ids[:, place]})
            torch.testing.assert_close(packed[:, place], alone, atol=1e-5, rtol=1e-5)


def test_gradients_in_training_are_those_of_the_plain_formula(monkeypatch):
    """In training attention takes other kernels; dropout that keeps everything leaves the result as it is."""
    monkeypatch.setattr("trainer.models.layers._keep_mask", lambda x, p: torch.full_like(x, 1 - p))
    model, batch = build(**CLASSIFIER), {"input_ids": make_ids(), "attention_mask": make_ids() > 10}

    def gradients():
        model.zero_grad()
        model(batch).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.train()
    torch.testing.assert_close(gradients(), plain, atol=1e-4, rtol=1e-4)


def test_initial_values():
    """The table of docs/models.md: all matrices N(0, init_std), norms one, biases zero."""
    model = Encoder(2000, d_model=128, num_heads=4, d_ff=512, num_layers=2, init_std=0.03, **CLASSIFIER)
    model.reset_parameters(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and parameter.numel() > 1000:
            assert math.isclose(parameter.std().item(), 0.03, rel_tol=0.05), name
            assert abs(parameter.mean().item()) < 0.002, name
        elif parameter.dim() == 1:
            assert (parameter == (1.0 if "norm" in name and name.endswith("weight") else 0.0)).all(), name


def test_a_model_built_on_meta_computes_what_one_built_directly_does():
    with torch.device("meta"):
        materialised = build()
    materialised.to_empty(device="cpu")
    materialised.reset_parameters(torch.Generator().manual_seed(0))
    batch = {"input_ids": make_ids()}
    torch.testing.assert_close(materialised(batch), build()(batch))


def test_flops_count_every_matrix_once_per_position_and_the_classifier_once():
    layers = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    scores = 12 * 2 * 32 * 81
    assert build().flops_per_sample(source_length=9) == 6 * (layers + 32 * 32 + 50 * 32) * 9 + scores
    assert build(**CLASSIFIER).flops_per_sample(source_length=9) == 6 * (layers * 9 + 32 * 32 + 32 * 3) + scores


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_heads": 5}, "model.d_model=32 does not divide by model.num_heads=5"),
        ({"head": "regression"}, "model.head=regression is not known"),
        ({"head": "classification"}, "model.num_classes=null with model.head=classification"),
        ({"num_classes": 4}, "model.num_classes=4 with model.head=masked_lm"),
    ],
)
def test_shapes_that_cannot_be_are_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        build(**options)
