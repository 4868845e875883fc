"""Private training: every sample's gradient is clipped, noise is as strong as said, and the budget is counted."""

from __future__ import annotations

import json
import math

import pytest
import torch

from trainer import privacy
from trainer.config import Config, PrivacyConfig
from trainer.engine.private import PrivateEngine
from trainer.errors import ConfigError
from trainer.models.mlp import MLP
from trainer.tasks import IGNORE
from trainer.tasks.classification import Classification

opacus = pytest.importorskip("opacus")
TASK = Classification("x", "y", 3)


def engine_of(noise: float, norm: float, global_size: int) -> PrivateEngine:
    model = MLP(4, 3, [5])
    model.reset_parameters(torch.Generator().manual_seed(0))
    return PrivateEngine(
        *(model, lambda named: torch.optim.SGD([p for _, p in named], lr=1.0), torch.float32, None),
        noise_multiplier=noise,
        sample_norm=norm,
        global_size=global_size,
    )


def batch_of(samples: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, 4, generator=generator) * torch.arange(1, samples + 1)[:, None]
    return {"inputs": inputs, "labels": torch.arange(samples) % 3}


def gradient(engine: PrivateEngine) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in engine.module.parameters()])


def test_the_gradient_is_the_mean_of_clipped_ones_however_it_is_split() -> None:
    batch, norm = batch_of(6), 0.7
    clipped, longer = [], 0
    for row in range(6):
        model = engine_of(0.0, norm, 6).module
        model.zero_grad(set_to_none=True)
        logits = model({"inputs": batch["inputs"][row : row + 1]})
        torch.nn.functional.cross_entropy(logits, batch["labels"][row : row + 1]).backward()
        one = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        longer += int(one.norm() > norm)
        clipped.append(one * min(1.0, norm / float(one.norm())))
    assert 0 < longer < 6  # some are clipped, some are not
    for cut in (6, 2):
        engine = engine_of(0.0, norm, 6)
        blank = {**batch, "labels": torch.full((6,), IGNORE)}
        parts = [{name: tensor[start : start + cut] for name, tensor in batch.items()} for start in range(0, 6, cut)]
        nll = sum(float(engine.forward_backward(TASK, part, 1.0, last=False).nll) for part in parts)
        engine.forward_backward(TASK, blank, 1.0, last=True)
        assert torch.allclose(gradient(engine), torch.stack(clipped).mean(dim=0), atol=1e-6)
        whole = TASK.loss(engine.module, batch)
        assert nll == pytest.approx(float(whole.nll), rel=1e-5)


def test_the_noise_is_as_strong_as_said_and_never_the_same() -> None:
    blank = {"inputs": torch.zeros(1, 4), "labels": torch.full((1,), IGNORE)}
    drawn = []
    for _ in range(40):
        engine = engine_of(3.0, 0.5, 10)
        engine.forward_backward(TASK, blank, 1.0, last=True)
        drawn.append(gradient(engine).clone())
    values = torch.stack(drawn)
    assert float(values.std()) == pytest.approx(3.0 * 0.5 / 10, rel=0.1)
    assert not torch.equal(values[0], values[1])


def test_a_run_that_spends_too_much_is_refused_with_the_noise_that_fits() -> None:
    facts = PrivacyConfig(noise_multiplier=0.8, num_samples=2000, delta=1e-5, max_epsilon=3.0)
    config = Config(steps=300, privacy=facts)
    object.__setattr__(config.batch, "global_size", 100)
    assert privacy.spent(facts, 100, 0) == 0.0
    assert privacy.spent(facts, 100, 10) < privacy.spent(facts, 100, 300)
    with pytest.raises(ConfigError, match=r"max_epsilon=3: steps=300 .* set privacy\.noise_multiplier=") as refused:
        privacy.check_budget(config)
    noise = float(str(refused.value).rpartition("noise_multiplier=")[2].split()[0])
    enough = PrivacyConfig(noise_multiplier=noise, num_samples=2000, delta=1e-5, max_epsilon=3.0)
    assert privacy.spent(enough, 100, 300) <= 3.0 < privacy.spent(facts, 100, 300)
    assert math.isfinite(noise)


def test_a_private_run_learns_and_tells_its_budget(run_trainer) -> None:
    words = [
        *("experiment=digits_mlp", "steps=40", "name=private", "logging=[]", "privacy.noise_multiplier=1.0"),
        *("privacy.num_samples=1500", "privacy.max_epsilon=20", "eval.every=40", "batch.global_size=64"),
    ]
    done = run_trainer(words).check()
    rows = [json.loads(line) for line in (done.runs_dir / "private" / "metrics.jsonl").read_text().splitlines()]
    told = [row for row in rows if "privacy/epsilon" in row]
    assert told and 1.0 < told[-1]["privacy/epsilon"] < 20 and told[-1]["eval/accuracy"] > 0.3
    refused = run_trainer([*words, "engine=zero1", "name=zero"])
    assert refused.returncode == 2 and "ZeRO sums the gradients" in refused.stderr
