"""Lion, AdamWScale and Muon update as their papers say, and their states are carried like any other."""

from __future__ import annotations

import math

import pytest
import torch

from tests.engine.test_plain import Squares, make_batch, make_engine, train_step, weights
from trainer.build import build
from trainer.composition import compose
from trainer.config import to_config
from trainer.errors import ConfigError
from trainer.models.mlp import MLP
from trainer.optim import build_optimizer, set_learning_rate
from trainer.parts import check_fit

LION = {"_target_": "trainer.optimizers.lion.Lion", "lr": 1e-3, "weight_decay": 0.1}
SCALE = {"_target_": "trainer.optimizers.adamw_scale.AdamWScale", "lr": 1e-2, "weight_decay": 0.1}
MUON = {"_target_": "trainer.optimizers.muon.Muon", "lr": 1e-2, "weight_decay": 0.1, "adamw_for": ["3"]}
ALL = [LION, SCALE, MUON]


def steps_of(optimizer, parameter, count=4):
    """The values of `parameter` after each of some updates, and the gradients."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        yield parameter.grad.clone(), parameter.detach().clone()


def one_matrix(rows=6, columns=4):
    return torch.nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)))


def test_lion_moves_every_element_by_the_sign_of_its_momentum():
    parameter = one_matrix()
    p, m = parameter.detach().clone(), torch.zeros(6, 4)
    for gradient, value in steps_of(build_optimizer(LION, [("w", parameter)]), parameter):
        p = p - 1e-3 * (torch.sign(0.9 * m + 0.1 * gradient) + 0.1 * p)
        m = 0.99 * m + 0.01 * gradient
        torch.testing.assert_close(value, p)


def test_adamw_scale_is_adamw_times_the_root_mean_square():
    parameter = one_matrix()
    with torch.no_grad():
        parameter.mul_(3.0)
    twin = torch.nn.Parameter(parameter.detach().clone())
    adamw = torch.optim.AdamW([twin], lr=1.0, eps=1e-6, weight_decay=0.0)
    before = parameter.detach().clone()
    for gradient, value in steps_of(build_optimizer({**SCALE, "weight_decay": 0.0}, [("w", parameter)]), parameter):
        with torch.no_grad():
            twin.copy_(before)
        twin.grad = gradient
        adamw.param_groups[0]["lr"] = 1e-2 * float(before.square().mean().sqrt())
        adamw.step()
        torch.testing.assert_close(value, twin.detach())
        before = value


def test_a_parameter_of_zeros_moves_all_the_same():
    parameter = torch.nn.Parameter(torch.zeros(5))
    *_, (_, value) = steps_of(build_optimizer(SCALE, [("b", parameter)]), parameter, 1)
    torch.testing.assert_close(value.abs(), torch.full((5,), 1e-2 * 1e-3), rtol=1e-2, atol=0)


def test_muon_takes_the_matrices_of_layers_and_adamw_the_rest():
    shapes = {"layers.0.w": (6, 4), "embedding.weight": (9, 4), "layers.0.norm": (4,)}
    generator = torch.Generator().manual_seed(2)
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    gradients = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    ours = {name: torch.nn.Parameter(value.clone()) for name, value in values.items()}
    twins = {name: torch.nn.Parameter(value.clone()) for name, value in values.items()}
    named = {**MUON, "adamw_for": ["embedding", "head"]}
    optimizer = build_optimizer(named, ours.items())
    options = {"lr": 3e-3, "betas": (0.9, 0.98)}
    theirs = [
        torch.optim.Muon([twins["layers.0.w"]], lr=3e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([twins["embedding.weight"]], weight_decay=0.1, **options),
        torch.optim.AdamW([twins["layers.0.norm"]], weight_decay=0.0, **options),
    ]
    set_learning_rate(optimizer, 3e-3)
    for _ in range(3):
        for name in shapes:
            ours[name].grad, twins[name].grad = gradients[name].clone(), gradients[name].clone()
        for one in (optimizer, *theirs):
            one.step()
    for name in shapes:
        torch.testing.assert_close(ours[name], twins[name])
    assert set(optimizer.state[ours["layers.0.w"]]) == {"momentum_buffer"}


@pytest.mark.parametrize("optimizer", ALL, ids=lambda part: part["_target_"].rpartition(".")[2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_carried_to_a_new_engine_goes_on_bit_for_bit(optimizer, dtype):
    engine, heir = (make_engine(dtype, optimizer=optimizer) for _ in range(2))
    for seed in range(3):
        train_step(engine, make_batch(seed=seed))
    kept = {(f.parameter, f.key): f.tensor.clone() for f in engine.fragments()}
    for fragment in heir.fragments():
        assert fragment.shape == tuple(dict(engine.module.named_parameters())[fragment.parameter].shape)
        fragment.tensor.copy_(kept.pop((fragment.parameter, fragment.key)))
    assert not kept
    heir.after_load(engine.scalars())
    for seed in range(3, 6):
        assert train_step(engine, make_batch(seed=seed)) == train_step(heir, make_batch(seed=seed))
    for name, value in weights(engine).items():
        assert torch.equal(value, weights(heir)[name]), name


@pytest.mark.parametrize("optimizer", ALL, ids=lambda part: part["_target_"].rpartition(".")[2])
def test_it_learns(optimizer):
    engine, batch = make_engine(optimizer=optimizer), make_batch()
    losses = []
    for _ in range(60):
        losses.append(float(engine.forward_backward(Squares(), batch, 1 / 12, last=True).nll))
        engine.step(1e-2 if optimizer is not SCALE else 5e-2)
    assert math.isfinite(losses[-1]) and losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("name", "why"), [("muon", "orthogonalises"), ("adamw_scale", "as a whole")])
@pytest.mark.parametrize("words", [["engine=zero2"], ["engine.tensor_parallel=2"]])
def test_what_needs_whole_matrices_is_refused_where_they_are_split(name, why, words):
    config = to_config(compose(["experiment=digits_mlp", f"optimizer={name}", *words]))
    task = build(config.task, "task", tokenizer=None)
    with pytest.raises(ConfigError, match=rf"optimizer={name}.*{why}.*{words[0].partition('=')[0]}"):
        check_fit(config, task, MLP(64, 10), None)
    fits = to_config(compose(["experiment=digits_mlp", f"optimizer={name}"]))
    check_fit(fits, task, MLP(64, 10), None)


def test_betas_that_cannot_be():
    with pytest.raises(ConfigError, match="betas"):
        build_optimizer({**LION, "betas": [0.9, 1.5]}, [("w", one_matrix())])
