"""A trainer that only writes down what it is asked for, for tests of what happens around runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig

from trainer.build import part_problems
from trainer.config import config_to_dict, to_config
from trainer.run_directory import RunDirectory


@dataclass
class Trained:
    """Call it as `python -m launch` calls what launches one run. outcomes: exit code, or an exception, by a word of the
    run's name; accuracy: of a learning rate."""

    runs_dir: Path
    accuracy: Callable[[float], float] = lambda lr: 1.0 - abs(lr - 0.25)
    outcomes: dict[str, int | Exception] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)

    def __call__(self, composed: DictConfig, words: list[str]) -> int:
        config = to_config(composed, part_problems)
        directory = RunDirectory.of(config)
        directory.check(config)
        self.started.append(config.name)
        code = next((outcome for word, outcome in self.outcomes.items() if word in config.name), 0)
        if isinstance(code, Exception):
            raise code
        directory.path.mkdir(parents=True, exist_ok=True)
        directory.config.write_text(yaml.safe_dump(config_to_dict(config)))
        rows: list[dict[str, Any]] = [
            {"step": step, "eval/loss": 1.0, "eval/accuracy": self.accuracy(config.optimizer["lr"]) - 0.1 * (step == 2)}
            for step in (1, 2)
        ]
        if code == 0:
            directory.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "ev')
            directory.evaluation.write_text(json.dumps({"split": "test", "eval/accuracy": 0.5}))
        directory.status({0: "finished", 75: "preempted"}.get(code, "failed"), config.steps, "", code)
        return code


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """In a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return Trained(tmp_path / "runs")
