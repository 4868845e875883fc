"""The plain engine: summed gradients, fp32 masters under bf16, clipping, and state that can be carried elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from trainer.engine.plain import PlainEngine
from trainer.optim import build_optimizer
from trainer.tasks import LossSums

ADAMW = {"_target_": "torch.optim.AdamW", "lr": 1e-2, "weight_decay": 0.1, "fused": True}


class Squares:
    """A task on vectors: the sum of squared errors of `model(x)` against `labels`."""

    def loss(self, model, batch):
        error = model(batch["x"].to(next(model.parameters()).dtype)).float() - batch["labels"]
        count = torch.tensor(len(error))
        return LossSums(error.square().sum(), error.square().sum().detach(), count, count)


def make_engine(dtype=torch.float32, clip_norm=None, optimizer=ADAMW):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.LayerNorm(7), nn.Linear(7, 3))
    return PlainEngine(module, lambda named: build_optimizer(optimizer, named), dtype, clip_norm)


def make_batch(samples=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(samples, 5, generator=generator),
        "labels": torch.randn(samples, 3, generator=generator),
    }


def train_step(engine, batch, pieces=1, lr=1e-2):
    parts = [
        dict(zip(batch, chunk, strict=True)) for chunk in zip(*(t.chunk(pieces) for t in batch.values()), strict=True)
    ]
    for index, part in enumerate(parts):
        engine.forward_backward(Squares(), part, 1 / len(batch["x"]), last=index == len(parts) - 1)
    return engine.step(lr)


def weights(engine):
    return {f.parameter: f.tensor.clone() for f in engine.fragments() if f.key == "master"}


@pytest.mark.parametrize("pieces", [2, 3, 12])
def test_the_update_does_not_depend_on_the_number_of_micro_batches(pieces):
    whole, split = make_engine(), make_engine()
    for seed in range(3):
        norm_whole = train_step(whole, make_batch(seed=seed))
        norm_split = train_step(split, make_batch(seed=seed), pieces)
        assert norm_split == pytest.approx(norm_whole, rel=1e-5)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(split)[name], value, rtol=1e-5, atol=1e-6)


def test_equals_torch_in_fp32():
    engine = make_engine()
    reference = make_engine().module
    groups = [
        {"params": [p for p in reference.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in reference.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    reference_weights = {name: nn.Parameter(p.detach().clone()) for name, p in reference.named_parameters()}
    for group in groups:
        group["params"] = [
            reference_weights[n] for n, p in reference.named_parameters() if any(p is q for q in group["params"])
        ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    for seed in range(4):
        batch = make_batch(seed=seed)
        train_step(engine, batch)
        output = torch.func.functional_call(reference, reference_weights, batch["x"])
        ((output - batch["labels"]).square().sum() / 12).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in weights(engine).items():
        torch.testing.assert_close(value, reference_weights[name].detach().flatten(), rtol=1e-5, atol=1e-6)


def test_clipping_limits_the_update_but_reports_the_true_norm():
    sgd = {"_target_": "torch.optim.SGD", "lr": 1.0}
    free, clipped = make_engine(optimizer=sgd), make_engine(clip_norm=0.01, optimizer=sgd)
    before = weights(clipped)
    norm = train_step(clipped, make_batch(), lr=1.0)
    assert norm == pytest.approx(train_step(free, make_batch(), lr=1.0))
    assert norm > 0.01
    change = torch.cat([weights(clipped)[name] - value for name, value in before.items()])
    assert float(change.norm()) == pytest.approx(0.01, rel=1e-3)


def test_bf16_keeps_small_updates_in_its_masters():
    engine = make_engine(torch.bfloat16)
    assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}
    before = weights(engine)
    for seed in range(20):
        train_step(engine, make_batch(seed=seed), lr=1e-5)
    after = weights(engine)
    assert {t.dtype for t in after.values()} == {torch.float32}
    moved = torch.cat([(after[name] - before[name]).abs() for name in before])
    assert 0 < float(moved.max()) < 1e-3  # far below bf16's resolution of the weights around 0.3
    for name, parameter in engine.module.named_parameters():
        torch.testing.assert_close(parameter.detach().flatten(), after[name].bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", [ADAMW, {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}])
def test_state_carried_to_a_new_engine_goes_on_bit_for_bit(dtype, optimizer):
    engine = make_engine(dtype, optimizer=optimizer)
    for seed in range(3):
        train_step(engine, make_batch(seed=seed))
    heir = make_engine(dtype, optimizer=optimizer)
    train_step(heir, make_batch(seed=99))  # any other history
    kept = {(f.parameter, f.key): f.tensor.clone() for f in engine.fragments()}
    for fragment in heir.fragments():
        fragment.tensor.copy_(kept[fragment.parameter, fragment.key])
    heir.after_load(engine.scalars())
    for seed in range(3, 6):
        assert train_step(heir, make_batch(seed=seed)) == train_step(engine, make_batch(seed=seed))
    for name, value in weights(engine).items():
        assert torch.equal(weights(heir)[name], value)


def test_state_exists_before_the_first_step_and_changes_nothing():
    engine = make_engine()
    before = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    keys = {fragment.key for fragment in engine.fragments()}
    assert keys == {"master", "exp_avg", "exp_avg_sq"}
    assert engine.scalars() == {"step": 0.0}
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter, before[name])
    fresh = make_engine()
    assert train_step(fresh, make_batch()) == train_step(engine, make_batch())
    for name, value in weights(fresh).items():
        assert torch.equal(weights(engine)[name], value)


@pytest.mark.parametrize(("poison", "max_norm"), [(float("nan"), math.inf), (float("inf"), math.inf), (1.0, 1e-9)])
def test_a_gradient_that_is_refused_leaves_everything_as_it_was(poison, max_norm):
    engine = make_engine(clip_norm=1.0)
    train_step(engine, make_batch())
    before = {(f.parameter, f.key): f.tensor.clone() for f in engine.fragments()}
    engine.forward_backward(Squares(), make_batch(seed=1), poison, last=True)
    engine.step(1e-2, max_norm)
    assert engine.skipped_steps == 1 and engine.scalars() == {"step": 1.0}
    assert all(f.tensor.equal(before[f.parameter, f.key]) for f in engine.fragments())
    heir = make_engine(clip_norm=1.0)
    train_step(heir, make_batch())
    assert train_step(engine, make_batch(seed=2)) == train_step(heir, make_batch(seed=2))


def test_evaluating_switches_dropout_and_gradients_off_and_back():
    engine = make_engine()
    with engine.evaluating():
        assert not engine.module.training
        assert not engine.module(make_batch()["x"]).requires_grad
    assert engine.module.training
