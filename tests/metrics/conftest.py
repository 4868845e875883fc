"""A run and its steps, as sinks see them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.metrics import RunInfo, StepInfo

MakeRun = Callable[..., RunInfo]
MakeStep = Callable[..., StepInfo]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(first_step: int = 0, total_steps: int = 100, **predicted: float) -> RunInfo:
        config = {"model": {"_target_": "a.B", "sizes": [1, 2]}, "seed": 7}
        return RunInfo("trial", tmp_path, config, {"world_size": 2, **predicted}, total_steps, first_step)

    return make


@pytest.fixture
def make_step() -> MakeStep:
    def make(step: int, loss: float = 2.5, skipped_steps: int = 0, **more: Any) -> StepInfo:
        return StepInfo(
            step=step,
            tokens=step * 1000,
            samples=step * 32,
            epoch=step / 50,
            loss=loss,
            grad_norm=1.25,
            lr=3e-4,
            step_seconds=2.0,
            tokens_per_second=12345.6,
            target_tokens=1000,
            padding_fraction=0.05,
            loader_wait_seconds=0.01,
            mfu=None,
            memory_bytes=10**9,
            skipped_steps=skipped_steps,
            **{"data": {"bad_record": 2}, **more},
        )

    return make
