"""Jobs of several agents: one is lost, or the link between them; the others go on, and the curve is the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.test_survival import environ
from tests.test_training import curve, samples_by_step, tiny

DEADLINE = 150  # seconds until a test gives up waiting
COMMON = tiny("precision=fp32", "steps=40", "checkpoint.every=5", "data.trace=true", "logging=[console]")


class Agent:
    """A torchrun with one rank, in a session of its own; `prefix` goes before its command line."""

    def __init__(self, log: Path, nodes: str, rendezvous: Mapping[str, str], words: Sequence[str],
                 env: Mapping[str, str], prefix: Sequence[str] = ()) -> None:  # fmt: skip
        self.log = log
        options = [f"--{name}={value}" for name, value in rendezvous.items()]
        command = [
            *(*prefix, sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc_per_node=1"),
            *("--rdzv-backend=c10d", "--max-restarts=5", *options, "-m", "trainer", *words),
        ]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=log.parent, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def told(self) -> str:
        return self.log.read_text()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.told
            time.sleep(0.02)

    def tree(self) -> list[psutil.Process]:
        """The launcher and what it has started."""
        try:
            return [root := psutil.Process(self.process.pid), *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self, only_ranks: bool = False) -> None:
        for process in self.tree():
            if not only_ranks or "RANK" in environ(process):
                os.kill(process.pid, signal.SIGKILL)


def told_step(*agents: Agent) -> int:
    """The last step on any console: rank 0 may be with any agent."""
    steps = [int(step) for agent in agents for step in re.findall(r"^step +(\d+)/", agent.told, re.MULTILINE)]
    return steps[-1] if steps else 0


@contextmanager
def killed_at_the_end(agents: list[Agent]) -> Iterator[None]:
    try:
        yield
    finally:
        for agent in agents:
            agent.kill()
            agent.process.wait()


def rendezvous(endpoint: str, **more: object) -> dict[str, str]:
    """Options that let an agent notice within seconds that another has gone."""
    settings = {"keep_alive_interval": 1, "keep_alive_max_attempt": 3, "last_call_timeout": 6, "join_timeout": 120}
    conf = ",".join(f"{name}={value}" for name, value in {**settings, **more}.items())
    return {"rdzv-endpoint": endpoint, "rdzv-id": "elastic", "rdzv-conf": conf}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_elastic_job_goes_on_without_the_agent_that_was_killed(run_trainer, tmp_path, trainer_env, free_port):
    """`--nnodes=1:2`: an agent and its rank are killed; the other goes on alone from the newest checkpoint."""
    runs_dir = run_trainer([*COMMON, "name=whole"]).check().runs_dir
    words = [*COMMON, "name=shrunk", f"runs_dir={runs_dir}"]
    env = {**trainer_env, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else torch 2.13 hangs where an agent is late
    agents: list[Agent] = []
    with killed_at_the_end(agents):
        for name, is_host in (("first", 1), ("second", 0)):  # the one that survives keeps the store
            options = rendezvous(f"127.0.0.1:{free_port}", is_host=is_host)
            agents.append(Agent(tmp_path / name, "1:2", options, words, env))
        agents[0].wait_until(lambda: told_step(*agents) >= 12)
        assert "x 2 ranks" in agents[0].told + agents[1].told
        agents[1].kill()
        assert agents[0].process.wait(DEADLINE) == 0, agents[0].told
    assert "x 1 ranks" in agents[0].told and re.search(r"after step (5|10|15) ", agents[0].told)
    assert curve(runs_dir, "shrunk") == pytest.approx(curve(runs_dir, "whole"), rel=1e-5)
    assert samples_by_step(runs_dir / "shrunk") == samples_by_step(runs_dir / "whole")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_killed_under_one_of_two_agents_restarts_the_job(run_trainer, tmp_path, trainer_env, free_port):
    """The agent whose rank died counts a restart, the other a change of members: their ranks find each other."""
    runs_dir = run_trainer([*COMMON, "name=whole"], ranks=2).check().runs_dir
    words = [*COMMON, "name=shot", f"runs_dir={runs_dir}"]
    options = rendezvous(f"127.0.0.1:{free_port}")
    agents: list[Agent] = []
    with killed_at_the_end(agents):
        agents += [Agent(tmp_path / name, "2", options, words, trainer_env) for name in ("first", "second")]
        for victim, step in ((1, 12), (0, 24)):
            agents[0].wait_until(lambda step=step: told_step(*agents) >= step)
            agents[victim].kill(only_ranks=True)
        assert [agent.process.wait(DEADLINE) for agent in agents] == [0, 0], agents[0].told + agents[1].told
    assert curve(runs_dir, "shot") == curve(runs_dir, "whole")
    assert samples_by_step(runs_dir / "shot") == samples_by_step(runs_dir / "whole")


class Hosts:
    """Two network namespaces joined by a cable: one machine as two hosts that share a file system."""

    def __init__(self) -> None:
        self.names = [f"sw{os.getpid()}{side}" for side in "ab"]
        self.addresses = ["10.213.77.1", "10.213.77.2"]

    def make(self, undo: ExitStack) -> None:
        here, there = self.names
        for name in self.names:
            ip(f"netns add {name}")
            undo.callback(ip, f"netns delete {name}")
        ip(f"link add cable0 netns {here} type veth peer cable0 netns {there}")
        for name, address in zip(self.names, self.addresses, strict=True):
            ip(f"-n {name} address add {address}/24 dev cable0")
            ip(f"-n {name} link set lo up")
            ip(f"-n {name} link set cable0 up")

    def cable(self, state: str) -> None:
        """Pull the cable ("down"), or plug it in ("up")."""
        ip(f"-n {self.names[0]} link set cable0 {state}")


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("the command ip is not installed (package iproute2)")
    with ExitStack() as undo:
        two = Hosts()
        try:
            two.make(undo)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        yield two


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_hosts_whose_link_goes_down_start_again_by_themselves(run_trainer, tmp_path, trainer_env, hosts):
    """ZeRO-3 over two hosts. The link breaks in mid-step: the watchdog ends both ranks, and later they go on."""
    common = [*COMMON, "engine=zero3", "guard.step_seconds=8"]
    runs_dir = run_trainer([*common, "name=whole"], ranks=2).check().runs_dir
    words = [*common, "name=parted", f"runs_dir={runs_dir}"]
    agents: list[Agent] = []
    with killed_at_the_end(agents):
        for index, (name, address) in enumerate(zip(hosts.names, hosts.addresses, strict=True)):
            options = rendezvous(f"{hosts.addresses[0]}:29431", is_host=int(index == 0), read_timeout=120)
            env = {**trainer_env, "GLOO_SOCKET_IFNAME": "cable0"}
            prefix = ("ip", "netns", "exec", name)
            agents.append(Agent(tmp_path / name, "2", {**options, "local-addr": address}, words, env, prefix))
        agents[0].wait_until(lambda: told_step(*agents) >= 12)
        hosts.cable("down")
        agents[0].wait_until(lambda: all("error: " in agent.told for agent in agents))
        assert json.loads((runs_dir / "parted" / "status.json").read_text())["reason"].startswith("hang: ")
        hosts.cable("up")
        assert [agent.process.wait(DEADLINE) for agent in agents] == [0, 0], agents[0].told + agents[1].told
    assert "after step " in agents[0].told + agents[1].told
    assert curve(runs_dir, "parted") == curve(runs_dir, "whole")
    assert samples_by_step(runs_dir / "parted") == samples_by_step(runs_dir / "whole")
