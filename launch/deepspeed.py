"""Hosts that ssh reaches, or this machine alone, by the `deepspeed` command."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.hostfile import choose, read_hostfile
from launch.job import Job, Launcher, at_least, python
from launch.local import count_gpus
from launch.process import end, is_alive, run_here
from trainer.errors import ConfigError, SetupError
from trainer.guards.heartbeats import Heartbeat, read_heartbeats


@dataclass(frozen=True)
class DeepSpeed(Launcher):
    """One `deepspeed` with all ranks of all hosts, which share the run directory, the working directory and Python.

    hostfile: lines `HOST slots=N`; None: this machine, without ssh. include, exclude: which hosts and slots of it,
    HOST[:SLOT,SLOT...][@HOST...]. ranks: without a hostfile, None = one a GPU, or one. threads: of each rank, None =
    its share of this host's cores. bind_cores: each rank to its own cores (numactl). ssh_port: None = ssh's own;
    master_addr: of the first host, None = what it says of itself; master_port: None = made of the run's name.
    variables: names of environment variables to take along to the hosts, beside PYTHON*, NCCL* and UCX*.
    """

    hostfile: str | None = None
    include: str | None = None
    exclude: str | None = None
    ranks: int | None = None
    threads: int | None = None
    bind_cores: bool = False
    ssh_port: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    variables: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        at_least(1, ranks=self.ranks, threads=self.threads, ssh_port=self.ssh_port, master_port=self.master_port)
        if self.hostfile is None and (self.include or self.exclude):
            raise ValueError("include and exclude choose from a hostfile; give one, or set ranks")
        if self.hostfile is not None and self.ranks is not None:
            raise ValueError("ranks is for this machine alone; with a hostfile, its slots are the ranks")
        for name in self.variables:
            if re.search("KEY|TOKEN|SECRET|PASSWORD", name.upper()):
                raise ValueError(
                    f"variables: {name} looks like a secret, and would be written down; set it on the hosts"
                )

    @property
    def world_size(self) -> int:
        if self.hostfile is None:
            return self.ranks or count_gpus() or 1
        return sum(map(len, self._slots().values()))

    def require(self) -> None:
        missing = [command for command in ("pdsh", "ssh") if self._remote() and shutil.which(command) is None]
        if missing:
            raise SetupError(f"launcher=deepspeed: there is no {' and no '.join(missing)} on PATH; install it.")
        if self._remote():
            with ThreadPoolExecutor(32) as pool:
                told = dict(zip(self._slots(), pool.map(self._reach, self._slots()), strict=True))
            if any(told.values()):
                raise SetupError(
                    "ssh without a password does not reach every host of the hostfile:\n  "
                    + "\n  ".join(f"{host}: {reason}" for host, reason in told.items() if reason)
                )

    def render(self, job: Job) -> Mapping[str, str]:
        port = self.master_port or 20000 + zlib.crc32(job.name.encode()) % 10000
        options = [f"--master_port={port}", "--no_ssh_check"]
        options += ["--bind_cores_to_rank"] if self.bind_cores else []
        options += [f"--ssh_port={self.ssh_port}"] if self.ssh_port else []
        files: dict[str, str] = {}
        if self.hostfile is None:
            options += [f"--hostfile={job.folder / 'none'}", f"--num_gpus={self.world_size}"]
        else:
            slots = self._slots()
            files["hostfile"] = "".join(f"{host} slots={max(every) + 1}\n" for host, every in slots.items())
            options += [f"--hostfile={job.folder / 'hostfile'}", "--include", _written(slots)]
            if self._remote():
                options += ["--force_multi"] + ([f"--master_addr={self.master_addr}"] if self.master_addr else [])
            else:
                options += [f"--master_addr={self.master_addr or '127.0.0.1'}"]
        variables = self._variables(job)
        files["environment"] = "".join(f"{name}={value}\n" for name, value in variables.items())
        variables["DS_ENV_FILE"] = str(job.folder / "environment")
        program, *words = job.trainer_words()[1:]
        command = [python(), "-m", "deepspeed.launcher.runner", *options, "--module", program, *words]
        return {**files, "run.sh": job.script(variables, command)}

    def submit(self, job: Job) -> int:
        head = next(iter(self._slots())) if self._remote() else None
        return run_here(job, ["bash", str(job.folder / "run.sh")], self.stop, head=head)

    def alive(self, handle: Mapping[str, Any]) -> bool | None:
        return is_alive(handle)

    def stop(self, handle: Mapping[str, Any], hard: bool) -> str:
        """A signal to DeepSpeed's processes would leave the ranks 30 s to save, or none; one rank that is told tells
        all."""
        beats = read_heartbeats(Path(handle["directory"]) / "heartbeats", 1, handle["created"])
        if hard or 0 not in beats or beats[0].ended:
            return end(handle, hard=handle["head"] is None)  # of several hosts, deepspeed itself ends the others
        return self._tell(beats[0], handle["head"])

    def _tell(self, rank: Heartbeat, host: str | None) -> str:
        """Send SIGUSR1 to a rank on `host` (None: this one). Raises SetupError where the host is not reached."""
        kill = ["kill", "-USR1", str(rank.pid)]
        kill = kill if host is None else [*self._ssh(host), *kill]
        done = subprocess.run(kill, capture_output=True, text=True)
        if done.returncode != 0:
            raise SetupError(f"{rank.who} cannot be told to stop: {' '.join(done.stderr.split())}")
        return f"sent SIGUSR1 to {rank.who}, which tells the others"

    def _slots(self) -> dict[str, list[int]]:
        """The slots to use by host; the first host has rank 0."""
        assert self.hostfile is not None
        return choose(read_hostfile(Path(self.hostfile)), self.include, self.exclude)

    def _remote(self) -> bool:
        """Whether ssh is needed: there is another host than this one."""
        here = {"localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn()}
        return self.hostfile is not None and not set(self._slots()) <= here

    def _ssh(self, host: str) -> list[str]:
        port = [] if self.ssh_port is None else ["-p", str(self.ssh_port)]
        return ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20", *port, host]

    def _reach(self, host: str) -> str:
        """Why ssh does not reach `host`; empty where it does."""
        done = subprocess.run([*self._ssh(host), "true"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        return "" if done.returncode == 0 else " ".join(done.stderr.split()) or f"ssh ended with {done.returncode}"

    def _variables(self, job: Job) -> dict[str, str]:
        """What every rank is to find in its environment."""
        on_one = self.world_size if self.hostfile is None else max(map(len, self._slots().values()))
        threads = self.threads or max(1, len(os.sched_getaffinity(0)) // on_one)
        missing = [name for name in self.variables if name not in os.environ]
        if missing:
            raise ConfigError(f"launcher.variables: {', '.join(missing)} is not set here; export it, or leave it out.")
        return {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"} | {
            name: os.environ[name] for name in self.variables
        }


def _written(slots: Mapping[str, Sequence[int]]) -> str:
    """Hosts and slots as DeepSpeed's --include wants them."""
    return "@".join(f"{host}:{','.join(map(str, every))}" for host, every in slots.items())
