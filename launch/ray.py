"""A Ray cluster, or a Ray of this machine alone, by Ray Train's TorchTrainer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launch.job import Job, Launcher, at_least, python
from launch.process import end, is_alive, run_here
from trainer.errors import SetupError

JOB = "ray.json"
CLEANER = "Failed to query Ray Train Controller actor state"
"""Told every second where Ray's dashboard, an extra of its own, is not installed."""

STOP = "stop"
"""A file of this name in the job's folder asks all ranks, wherever they run, to save and end."""


@dataclass(frozen=True)
class Ray(Launcher):
    """One Ray worker a rank, placed by Ray; see configs/launcher/ray.yaml for the keys."""

    ranks: int = 1
    gpus_per_rank: int = 0
    cpus_per_rank: int = 1
    address: str | None = None
    placement: str = "PACK"
    resources: Mapping[str, float] | None = None
    runtime_env: Mapping[str, Any] | None = None
    max_failures: int = 3
    save_seconds: int = 300

    def __post_init__(self) -> None:
        at_least(0, gpus_per_rank=self.gpus_per_rank, cpus_per_rank=self.cpus_per_rank)
        at_least(-1, max_failures=self.max_failures)
        at_least(1, ranks=self.ranks, save_seconds=self.save_seconds)

    @property
    def world_size(self) -> int:
        return self.ranks

    def render(self, job: Job) -> Mapping[str, str]:
        facts = {
            "name": job.name,
            "cwd": str(job.cwd),
            "words": job.trainer_words(),
            "workers": self.ranks,
            "cpus": self.ranks * self.cpus_per_rank,
            "resources": {
                "CPU": self.cpus_per_rank,
                **({"GPU": self.gpus_per_rank} if self.gpus_per_rank else {}),
                **(self.resources or {}),
            },
            "address": self.address,
            "placement": self.placement,
            "runtime_env": dict(self.runtime_env or {}),
            "max_failures": self.max_failures,
            "save_seconds": self.save_seconds,
        }
        script = job.script(
            {"PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": CLEANER},
            [python(), "-m", "launch.ray_train", str(job.folder)],
        )
        return {"run.sh": script, JOB: json.dumps(facts, indent=1) + "\n"}

    def require(self) -> None:
        if find_spec("ray") is None:
            raise SetupError("launcher=ray needs Ray Train, which is not installed: install shardwright[ray].")

    def submit(self, job: Job) -> int:
        (job.folder / STOP).unlink(missing_ok=True)
        shutil.rmtree(job.folder / "ray", ignore_errors=True)  # Ray's notes on what has ended
        return run_here(job, ["bash", str(job.folder / "run.sh")])

    def alive(self, handle: Mapping[str, Any]) -> bool | None:
        return is_alive(handle)

    def stop(self, handle: Mapping[str, Any], hard: bool) -> str:
        return end(handle, hard)


def read_job(folder: Path) -> dict[str, Any]:
    """What `Ray.render` wrote."""
    return dict(json.loads((folder / JOB).read_text(encoding="utf-8")))
