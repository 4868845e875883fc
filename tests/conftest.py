"""Fixtures for every room: a hermetic environment, free ports, and real trainer processes."""

from __future__ import annotations

import multiprocessing.util
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

from tests.warm import run_warm

ROOT = Path(__file__).resolve().parent.parent

# Before anything imports torch: tests share the cores with their xdist siblings, and must not reach a network hub.
HERMETIC = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "MPLBACKEND": "Agg",
}
FROM_OUTSIDE = ("WANDB_API_KEY", "WANDB_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
os.environ.update(HERMETIC)
for _name in FROM_OUTSIDE:
    os.environ.pop(_name, None)
if "torch" in sys.modules:
    sys.modules["torch"].set_num_threads(1)

# What a test finds does not depend on how busy the machine is: no example has a time that it must keep.
hypothesis.settings.register_profile(
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: at the end of the run no worker waits for a long test of another."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever tests and all that they start leave among temporary files lies in pytest's folder, and goes with it."""
    multiprocessing.util.get_temp_dir()  # for sockets, whose paths are short; it goes by itself
    folder = tmp_path_factory.mktemp("tmp")
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


@dataclass(frozen=True)
class Finished:
    """What a process left behind: exit code (negative: the signal that ended it), streams, runs directory."""

    returncode: int
    stdout: str
    stderr: str
    runs_dir: Path

    @property
    def output(self) -> str:
        """Both streams, for assertions that do not care which."""
        return self.stdout + self.stderr

    def check(self) -> Finished:
        """Itself, if it succeeded; otherwise the test fails and shows the output."""
        if self.returncode != 0:
            pytest.fail(f"exit code {self.returncode}\n{self.stdout[-4000:]}\n{self.stderr[-8000:]}", pytrace=False)
        return self


def find_free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    return find_free_port()


def launch_command(launcher: str, ranks: int, module: str) -> list[str]:
    """The command line before the module's own arguments. `launcher`: "python", "torchrun" or "deepspeed"."""
    port = str(find_free_port())
    if launcher == "python":
        assert ranks == 1, "several ranks need a launcher"
        return [sys.executable, "-m", module]
    if launcher == "torchrun":
        address = ["--master_addr=127.0.0.1", f"--master_port={port}"]
        return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", *address, "-m", module]
    assert launcher == "deepspeed", launcher
    script = Path(sysconfig.get_path("scripts")) / "deepspeed"
    return [sys.executable, str(script), "--num_gpus", str(ranks), "--master_port", port, "--module", module]


def run_command(
    command: Sequence[str], cwd: Path, env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run in a process group of its own, which is killed whole when `timeout` seconds have passed."""
    with subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
            message = f"{' '.join(command)}\nran longer than {timeout} s\n{stdout[-4000:]}\n{stderr[-8000:]}"
            pytest.fail(message, pytrace=False)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


RunTrainer = Callable[..., Finished]


@pytest.fixture
def trainer_env() -> dict[str, str]:
    """The environment of a trainer process that works from any folder."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, **HERMETIC, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def run_trainer(tmp_path: Path, trainer_env: dict[str, str]) -> RunTrainer:
    """`run_trainer(args, ranks=1, launcher=None, ...)` runs real processes, waits, and returns a `Finished`.

    args: the words after `python -m trainer`; `runs_dir` is set to tmp_path/runs unless they name one.
    ranks: of one machine. They start warm (see `tests/warm.py`), so that a test costs what it tests.
    launcher: "python", "torchrun" or "deepspeed" starts from nothing, by that command line.
    cwd: the working directory, default tmp_path. env: added to the environment. timeout: seconds until it is killed.
    module: another command, such as "trainer.evaluate".
    """

    def run(
        args: Sequence[str] = (),
        *,
        ranks: int = 1,
        launcher: str | None = None,
        cwd: Path = tmp_path,
        env: Mapping[str, str] | None = None,
        timeout: float = 240,
        module: str = "trainer",
    ) -> Finished:
        given = [arg.partition("=")[2] for arg in args if arg.startswith("runs_dir=")]
        runs_dir = Path(cwd, given[-1]) if given else tmp_path / "runs"
        words = [*args] if given else [*args, f"runs_dir={runs_dir}"]
        whole_env = {**trainer_env, **(env or {})}
        if launcher is None:
            done = run_warm(module, words, ranks, cwd, whole_env, timeout)
        else:
            done = run_command(launch_command(launcher, ranks, module) + words, cwd, whole_env, timeout)
        return Finished(done.returncode, done.stdout, done.stderr, runs_dir)

    return run
