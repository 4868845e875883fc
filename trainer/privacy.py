"""The privacy budget of a run with differentially private training, by opacus' Renyi accountant.

DP-SGD (Abadi et al. 2016) with noise of standard deviation noise_multiplier x clip_norm on the sum of clipped gradients
is (epsilon, delta)-private for one sample more or less in the train split; composed by Renyi divergences (Mironov 2017;
Mironov et al. 2019 for the subsampled Gaussian mechanism). The bound is for Poisson sampling at rate global batch /
samples; a stream that goes through shuffled data in fixed batches is what it is applied to in practice.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from trainer.config import Config, PrivacyConfig
from trainer.errors import ConfigError, SetupError


def spent(privacy: PrivacyConfig, global_size: int, steps: int) -> float:
    """epsilon at `privacy.delta` after `steps` steps; infinite without noise, 0 before the first step.

    Raises SetupError without opacus.
    """
    assert privacy.noise_multiplier is not None and privacy.num_samples is not None
    if steps == 0:
        return 0.0
    accountants = _accountants()
    accountant = accountants.RDPAccountant()
    accountant.history = [(privacy.noise_multiplier, _rate(privacy, global_size), steps)]
    with warnings.catch_warnings():  # about the order of Renyi divergence that it settled on
        warnings.simplefilter("ignore")
        epsilon: float = accountant.get_epsilon(delta=privacy.delta)
    return epsilon


def check_budget(config: Config) -> None:
    """Refuse a run that would spend more than `privacy.max_epsilon`, with the noise that fits. Raises ConfigError."""
    privacy = config.privacy
    if privacy.noise_multiplier is None:
        return
    size = config.batch.global_size
    whole = spent(privacy, size, config.steps)
    if privacy.max_epsilon is None or whole <= privacy.max_epsilon:
        return
    from opacus.accountants.utils import get_noise_multiplier

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        enough: float = get_noise_multiplier(
            target_epsilon=privacy.max_epsilon,
            target_delta=privacy.delta,
            sample_rate=_rate(privacy, size),
            steps=config.steps,
            accountant="rdp",
        )
    raise ConfigError(
        f"privacy.max_epsilon={privacy.max_epsilon:g}: steps={config.steps} with"
        f" privacy.noise_multiplier={privacy.noise_multiplier:g} spend epsilon={whole:.2f} at"
        f" privacy.delta={privacy.delta:g}; set privacy.noise_multiplier={math.ceil(100 * enough) / 100:g} or more."
    )


def metrics(config: Config, step: int) -> dict[str, float]:
    """What a private run tells with each evaluation; nothing for others."""
    if config.privacy.noise_multiplier is None:
        return {}
    epsilon = spent(config.privacy, config.batch.global_size, step)
    return {"privacy/epsilon": epsilon, "privacy/delta": config.privacy.delta}


def _rate(privacy: PrivacyConfig, global_size: int) -> float:
    assert privacy.num_samples is not None
    return min(1.0, global_size / privacy.num_samples)


def _accountants() -> Any:
    try:
        from opacus import accountants
    except ImportError as error:
        raise SetupError("privacy.noise_multiplier needs opacus; install shardwright[privacy].") from error
    return accountants
