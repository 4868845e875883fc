"""Fixtures of the launchers: a cluster of Slurm's, hosts with ssh, and a run to compare with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT, Finished, run_command
from tests.launch.slurm_cluster import Cluster, slurm_cluster
from tests.test_elastic import Hosts, hosts  # noqa: F401  # a fixture
from tests.test_training import curve, samples_by_step, tiny

COMMON = tiny("precision=fp32", "steps=16", "data.trace=true", "logging=[console]")
DEADLINE = 200  # seconds until a test gives up waiting


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real Slurm, or a skip with the reason."""
    with slurm_cluster() as running:
        yield running


class Launching:
    """`python -m launch` and its sisters as real processes in `tmp_path`."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.folder, self.env, self.prefix = folder, dict(env), list[str]()

    def command(self, *words: str, module: str = "launch") -> list[str]:
        return [*self.prefix, sys.executable, "-m", module, *words]

    def __call__(self, *words: str, module: str = "launch") -> Finished:
        done = run_command(self.command(*words, module=module), self.folder, self.env, 240)
        return Finished(done.returncode, done.stdout, done.stderr, self.folder / "runs")

    def state(self, run: str) -> dict[str, object]:
        done = self(f"run={run}", "--json", module="launch.status").check()
        states: list[dict[str, object]] = json.loads(done.stdout)
        return states[0]

    @contextmanager
    def begun(self, *words: str, until: Callable[[], bool]) -> Iterator[subprocess.Popen[bytes]]:
        """A launcher that waits for its run, once `until` is true."""
        log = self.folder / "launch.log"
        with log.open("ab") as file, subprocess.Popen(
            self.command(*words), cwd=self.folder, env=self.env, stdout=file, stderr=file, start_new_session=True
        ) as process:  # fmt: skip
            try:
                deadline = time.monotonic() + DEADLINE
                while not until():
                    assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                    time.sleep(0.02)
                yield process
            finally:
                if process.poll() is None:
                    run = next(word for word in words if word.startswith("name=")).replace("name=", "run=")
                    self(run, "hard=true", module="launch.stop")
                    process.kill()


@pytest.fixture
def launching(tmp_path: Path, trainer_env: dict[str, str]) -> Launching:
    return Launching(tmp_path, trainer_env)


@pytest.fixture
def ssh_hosts(hosts: Hosts, launching: Launching, tmp_path: Path) -> Iterator[Hosts]:  # noqa: F811
    """Two hosts that reach each other by ssh, on port 2222; `launching` happens on the first of them."""
    missing = [name for name in ("ssh", "ssh-keygen", "pdsh", "/usr/sbin/sshd") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (packages openssh-server, openssh-client, pdsh)")
    Path("/run/sshd").mkdir(exist_ok=True)
    keys, binaries = tmp_path / "keys", tmp_path / "bin"
    for folder in (keys, binaries):
        folder.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True)
    server = {
        "Port": 2222, "HostKey": keys / "host", "AuthorizedKeysFile": keys / "user.pub", "PidFile": "none",
        "UsePAM": "no", "StrictModes": "no", "PasswordAuthentication": "no", "PermitRootLogin": "yes",
    }  # fmt: skip
    client = {
        "IdentityFile": keys / "user", "IdentitiesOnly": "yes", "UserKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "no", "LogLevel": "ERROR",
    }  # fmt: skip
    for name, settings in (("server", server), ("client", client)):
        (keys / name).write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    (binaries / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {keys / "client"} "$@"\n')
    (binaries / "ssh").chmod(0o755)
    launching.prefix = ["ip", "netns", "exec", hosts.names[0]]
    launching.env |= {"PATH": f"{binaries}:{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": "cable0"}
    with ExitStack() as undo:
        for name in hosts.names:
            command = ["ip", "netns", "exec", name, "/usr/sbin/sshd", "-D", "-e", "-f", str(keys / "server")]
            log = undo.enter_context((keys / f"{name}.log").open("wb"))
            process = subprocess.Popen(command, stdout=log, stderr=log)
            undo.callback(process.wait)
            undo.callback(process.terminate)
        yield hosts


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of COMMON, trained by one process that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "trainer", *COMMON, "name=whole"]
    done = run_command(command, folder, {**os.environ, "PYTHONPATH": path}, 240)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "whole"


def same_as(whole_run: Path, run: Path) -> None:
    """The same samples in the same order, and the same curve but for rounding."""
    assert samples_by_step(run) == samples_by_step(whole_run)
    assert curve(run.parent, run.name) == pytest.approx(curve(whole_run.parent, whole_run.name), rel=1e-5)
