"""A real Slurm of one host, in a folder of its own: munged, slurmctld and slurmd on free ports."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.conftest import find_free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
SECONDS = 60
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
MailProg=/bin/true
FirstJobId={first_job}
NodeName={host} NodeAddr=127.0.0.1 CPUs=4
PartitionName=test Nodes={host} Default=YES State=UP
"""


class Cluster:
    """How to reach it: `env` for Slurm's commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *command: str) -> str:
        """What a command of Slurm's prints."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        facts = dict(word.split("=", 1) for word in self.call("scontrol", "show", "job", job).split() if "=" in word)
        return facts["JobState"]

    def signal(self, job: str, *how: str) -> bool:
        """Whether scancel could do so; it may come too early or too late."""
        return (
            subprocess.run(["scancel", *how, job], env=self.env, capture_output=True, timeout=SECONDS).returncode == 0
        )

    def wait_for(self, condition: Callable[[], bool], told: Callable[[], str], seconds: float = 200) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, told() + (self.folder / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.1)


@contextmanager
def slurm_cluster() -> Iterator[Cluster]:
    """Starts it, or skips with the reason; at the end nothing of it is left."""
    missing = [name for name in (*DAEMONS, "sbatch", "srun") if not _which(name)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"a Slurm of our own needs root and {', '.join(missing) or 'no package more'} (slurm-wlm, munge)")
    with ExitStack() as undo:
        folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short: a socket's path has 107 characters
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        cluster = Cluster(folder)
        folder.chmod(0o755)
        for name in ("state", "spool"):
            (folder / name).mkdir()
        (folder / "key").write_bytes(os.urandom(64))
        (folder / "key").chmod(0o600)
        port = find_free_port()
        facts = {"host": socket.gethostname().partition(".")[0], "ports": (port, find_free_port()), "folder": folder}
        (folder / "slurm.conf").write_text(CONF.format(**facts, first_job=port))
        files = {"socket": "munge.socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge = [f"--{option}={folder / file}" for option, file in files.items()]
        _start(undo, cluster, ["munged", "--foreground", "--force", *munge])
        cluster.wait_for((folder / "munge.socket").exists, lambda: (folder / "munged.out").read_text())
        for name in ("slurmctld", "slurmd"):
            _start(undo, cluster, [name, "-D", "-f", str(folder / "slurm.conf")])
        undo.callback(_end_jobs, cluster)
        cluster.wait_for(lambda: "idle" in _try(cluster, "sinfo", "--noheader", "--format=%T"), lambda: "no idle node")
        yield cluster


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _start(undo: ExitStack, cluster: Cluster, command: Sequence[str]) -> None:
    out = undo.enter_context((cluster.folder / f"{command[0]}.out").open("wb"))
    program = _which(command[0])
    assert program is not None
    process = subprocess.Popen([program, *command[1:]], env=cluster.env, stdout=out, stderr=out)
    undo.callback(process.wait)
    undo.callback(process.terminate)


def _try(cluster: Cluster, *command: str) -> str:
    return subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=SECONDS).stdout


def _end_jobs(cluster: Cluster) -> None:
    _try(cluster, "scancel", "--signal=KILL", "--full", "--partition=test")
    _try(cluster, "scancel", "--partition=test")
    cluster.wait_for(lambda: not _try(cluster, "squeue", "--noheader"), lambda: _try(cluster, "squeue"))
