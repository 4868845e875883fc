"""This machine, by torchrun."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launch.job import Job, Launcher, at_least
from launch.process import end, is_alive, run_here
from launch.torchrun import environment, torchrun


@dataclass(frozen=True)
class Local(Launcher):
    """One torchrun with all ranks.

    ranks: None = one a GPU, or one; threads: of each rank, None = its share of the cores; max_restarts: how often the
    job begins again by itself after a rank has failed; save_seconds: for the last save after a signal; numa: how ranks
    are bound to the cores near their GPU, torchrun's --numa-binding.
    """

    ranks: int | None = None
    threads: int | None = None
    max_restarts: int = 0
    save_seconds: int = 300
    numa: Literal["node", "socket", "exclusive", "core-complex"] | None = None

    def __post_init__(self) -> None:
        at_least(1, ranks=self.ranks, threads=self.threads, save_seconds=self.save_seconds)
        at_least(0, max_restarts=self.max_restarts)

    @property
    def world_size(self) -> int:
        return self.ranks or count_gpus() or 1

    def render(self, job: Job) -> Mapping[str, str]:
        numa = [] if self.numa is None else [f"--numa-binding={self.numa}"]
        command = torchrun(self.world_size, self.max_restarts, ["--standalone", *numa], job.trainer_words())
        return {"run.sh": job.script(environment(self.threads, self.world_size, self.save_seconds), command)}

    def submit(self, job: Job) -> int:
        return run_here(job, ["bash", str(job.folder / "run.sh")])

    def alive(self, handle: Mapping[str, Any]) -> bool | None:
        return is_alive(handle)

    def stop(self, handle: Mapping[str, Any], hard: bool) -> str:
        return end(handle, hard)


def count_gpus() -> int:
    """GPUs of this machine that torch can use."""
    import torch

    return torch.cuda.device_count()
