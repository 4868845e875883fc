"""A cluster that Slurm manages: by sbatch, or by srun within an allocation that is there."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from launch.job import Job, Launcher, at_least, python
from launch.process import end, is_alive, run_here
from launch.torchrun import environment, torchrun
from trainer.errors import SetupError


@dataclass(frozen=True)
class Slurm(Launcher):
    """One batch job, or a chain of them.

    nodes, ranks_per_node, cpus_per_rank, gpus_per_node, memory_gb (of a node), minutes (time limit), partition,
    account, qos: what is asked for; None: the cluster's default. sbatch: further options, such as
    `--constraint=a100`; setup: shell lines before the start, such as `module load cuda`.
    agent: `srun` starts every rank, `torchrun` one agent a node, which can restart ranks by itself. max_restarts: after
    a rank has failed or hangs. requeue: go on by itself after a preemption or the time limit; array: instead, so many
    jobs in a row, for clusters that do not requeue. signal_seconds: before the time limit, when ranks are told to
    save; save_seconds: for that save.
    container: an image (with pyxis: ENROOT's name or a file; with apptainer: a file or URL); mounts: HOST:CONTAINER
    beside the run directory and the working directory. python: on the nodes; None: this one, `python` in a container.
    port: of the rendezvous; None: made of the job's number.
    """

    nodes: int = 1
    ranks_per_node: int = 1
    cpus_per_rank: int | None = None
    gpus_per_node: int | None = None
    memory_gb: int | None = None
    minutes: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    sbatch: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    agent: Literal["srun", "torchrun"] = "srun"
    max_restarts: int = 0
    requeue: bool = True
    array: int | None = None
    signal_seconds: int = 120
    save_seconds: int = 300
    container: str | None = None
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: list[str] = field(default_factory=list)
    python: str | None = None
    port: int | None = None

    def __post_init__(self) -> None:
        at_least(1, nodes=self.nodes, ranks_per_node=self.ranks_per_node, cpus_per_rank=self.cpus_per_rank)
        at_least(1, gpus_per_node=self.gpus_per_node, memory_gb=self.memory_gb, minutes=self.minutes, array=self.array)
        at_least(1, signal_seconds=self.signal_seconds, save_seconds=self.save_seconds)
        at_least(0, max_restarts=self.max_restarts)
        if self.minutes is not None and 60 * self.minutes <= self.signal_seconds:
            raise ValueError(f"signal_seconds={self.signal_seconds} is no less than minutes={self.minutes}")
        for mount in self.mounts:
            if ":" not in mount:
                raise ValueError(f"mounts: {mount!r} is not HOST:CONTAINER")

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    def require(self) -> None:
        command = "srun" if _inside() else "sbatch"
        if shutil.which(command) is None:
            raise SetupError(
                f"launcher=slurm: there is no {command} on PATH; launch from a login node of the cluster, or write what"
                " would be submitted with dry_run=true."
            )

    def render(self, job: Job) -> Mapping[str, str]:
        lines = ["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in self._options(job))]
        return {"job.sh": "\n".join([*lines, *self._body(job), ""])}

    def submit(self, job: Job) -> int:
        script = str(job.folder / "job.sh")
        if _inside():
            return run_here(job, ["bash", script, "inside"], self.stop)
        done = _slurm("sbatch", "--parsable", script)
        if done.returncode != 0:
            raise SetupError(f"sbatch refuses {script}: {' '.join(done.stderr.split())}")
        number = done.stdout.strip().partition(";")[0]
        job.remember({"job": number})
        print(f"submitted as job {number}; python -m launch.status shows how it stands")
        return 0

    def alive(self, handle: Mapping[str, Any]) -> bool | None:
        if "pid" in handle:
            return is_alive(handle)
        if shutil.which("squeue") is None:
            return None
        done = _slurm("squeue", "--noheader", "--format=%T", f"--jobs={handle['job']}")
        if done.returncode != 0:
            return False if "Invalid job id" in done.stderr else None
        return bool(done.stdout.strip())

    def stop(self, handle: Mapping[str, Any], hard: bool) -> str:
        if "pid" in handle:
            return end(handle, hard, kills="srun")
        number = str(handle["job"])
        if shutil.which("scancel") is None:
            raise SetupError(f"Slurm runs it as job {number}, and there is no scancel on PATH.")
        if hard:
            _must("scancel", number)
            _slurm("scancel", "--signal=KILL", number)
            return f"cancelled job {number}"
        _must("scontrol", "update", f"JobId={number}", "Requeue=0")
        _must("scancel", "--state=PENDING", number)
        _must("scancel", "--signal=USR1", number)
        return f"sent SIGUSR1 to the ranks of job {number}; it will not be requeued"

    def _options(self, job: Job) -> list[str]:
        output = str(job.folder / "slurm").replace("%", "%%") + ("-%A_%a.out" if self.array else "-%j.out")
        gpus = self.gpus_per_node
        given = {
            "job-name": job.name.replace("/", "."),
            "nodes": self.nodes,
            "ntasks-per-node": self.ranks_per_node if self.agent == "srun" else 1,
            "cpus-per-task": self._cpus_per_task,
            "gpus-per-node": gpus,
            "mem": None if self.memory_gb is None else f"{self.memory_gb}G",
            "time": self.minutes,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "array": None if self.array is None else f"1-{self.array}%1",
            "signal": f"USR1@{self.signal_seconds}",
            "output": output,
        }
        options = [f"--{name}={shlex.quote(str(value))}" for name, value in given.items() if value is not None]
        requeue = "--requeue" if self.requeue and self.array is None else "--no-requeue"
        return [*options, "--open-mode=append", requeue, *self.sbatch]

    @property
    def _cpus_per_task(self) -> int | None:
        if self.cpus_per_rank is None or self.agent == "srun":
            return self.cpus_per_rank
        return self.cpus_per_rank * self.ranks_per_node

    def _body(self, job: Job) -> list[str]:
        """What the batch script does, on the first node."""
        variables = environment(self.cpus_per_rank or 1, self.ranks_per_node, self.save_seconds)
        port = self.port or "$((10000 + SLURM_JOB_ID % 20000))"
        return [
            f"cd -- {shlex.quote(str(job.cwd))} || exit",
            *self.setup,
            *(f'export {name}="${{{name}:-{value}}}"' for name, value in variables.items()),
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            f"MASTER_PORT={port}",
            'PET_RDZV_ENDPOINT="$MASTER_ADDR:$MASTER_PORT" PET_RDZV_ID="$SLURM_JOB_ID"',
            "export MASTER_ADDR MASTER_PORT PET_RDZV_ENDPOINT PET_RDZV_ID",
            f"folder={shlex.quote(str(job.folder))}",
            f"status={shlex.quote(str(job.directory / 'status.json'))}",
            'touch "$folder/started"',
            f"{shlex.join([*self._srun(job), *self._ranks(job)])} &",
            "ranks=$! cancelled=no",
            _WAIT,
            *self._after(),
            'exit "$code"',
        ]

    def _srun(self, job: Job) -> list[str]:
        """srun, with one task a rank or a node. A rank that fails does not end the others at once: they notice, and say
        whom they miss."""
        tasks = self.ranks_per_node if self.agent == "srun" else 1
        words = ["srun", f"--nodes={self.nodes}", f"--ntasks={self.nodes * tasks}", f"--ntasks-per-node={tasks}"]
        words += [] if self._cpus_per_task is None else [f"--cpus-per-task={self._cpus_per_task}"]
        words += ["--kill-on-bad-exit=0", f"--wait={self.save_seconds}"]
        if self.container is None:
            return words
        mounts = dict.fromkeys([f"{path}:{path}" for path in (job.cwd, job.directory.parent)] + self.mounts)
        if self.container_runtime == "pyxis":
            options = {"image": self.container, "mounts": ",".join(mounts), "workdir": str(job.cwd)}
            return [*words, *(f"--container-{name}={value}" for name, value in options.items())]
        binds = [word for mount in mounts for word in ("--bind", mount)]
        nv = ["--nv"] if self.gpus_per_node else []
        return [*words, "apptainer", "exec", *nv, *binds, "--pwd", str(job.cwd), self.container]

    def _ranks(self, job: Job) -> list[str]:
        """What each task runs; torchrun finds the rendezvous in PET_RDZV_ENDPOINT, a rank in MASTER_ADDR."""
        interpreter = self.python or ("python" if self.container else python())
        if self.agent == "srun":
            return [interpreter, *job.trainer_words()]
        rendezvous = [f"--nnodes={self.nodes}", "--rdzv-backend=c10d"]
        return torchrun(self.ranks_per_node, self.max_restarts, rendezvous, job.trainer_words(), interpreter)

    def _after(self) -> list[str]:
        """What becomes of the job when its ranks have ended."""
        lines = [_DECIDE.replace("MAX_RESTARTS", str(self.max_restarts if self.agent == "srun" else 0))]
        if self.array is not None:
            lines.append('[ "$again" = yes ] || scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"  # the rest of the array')
        elif self.requeue:
            lines.append('[ "$again" = yes ] && [ "${1:-}" != inside ] && scontrol requeue "$SLURM_JOB_ID"')
        return lines


_WAIT = """
# Slurm signals the ranks itself. What comes to this shell alone is passed on; SIGTERM to it cancels the job. Never
# SIGTERM to srun, which would kill the ranks.
trap 'signalled=yes; kill -USR1 "$ranks"' USR1 USR2
trap 'signalled=yes cancelled=yes; kill -USR1 "$ranks"' TERM INT
code=127
while signalled=no; do  # wait returns at a signal, too
    wait "$ranks"
    ended=$?
    [ "$ended" = 127 ] && break
    code=$ended
    [ "$signalled" = no ] && break
done
"""
"""Bash: the exit code of the background process $ranks, in $code."""

_DECIDE = """\
if [ "$code" != 0 ] && [ "$status" -nt "$folder/started" ]; then  # torchrun says 1 for all that is not 0
    told=$(sed -n 's/.*"exit_code": \\([0-9]*\\).*/\\1/p' "$status")
    code=${told:-$code}
fi
again=no
case $code in
    0 | 2) ;;                # finished; refused
    75 | 138) again=yes ;;   # preempted; or signalled before it could listen
    *) echo "$code" >>"$folder/failures"; [ "$(wc -l <"$folder/failures")" -le MAX_RESTARTS ] && again=yes ;;
esac
[ "$cancelled" = yes ] && again=no"""
"""Bash: whether the job is to go on, in $again."""


def _inside() -> bool:
    """Whether this process is within an allocation of Slurm's."""
    return "SLURM_JOB_ID" in os.environ


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


def _must(*command: str) -> None:
    """Run a command of Slurm's. Raises SetupError where it fails."""
    done = _slurm(*command)
    if done.returncode != 0:
        raise SetupError(f"{shlex.join(command)} failed: {' '.join(done.stderr.split())}")
