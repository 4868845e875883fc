"""Runs that are shot at: what comes out is what an uninterrupted run gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import launch_command
from tests.held import HELD, STEP
from tests.test_training import curve, samples_by_step, tiny

DEADLINE = 120  # seconds until a test gives up waiting


def ranks_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The trainer processes below a launcher, in the order of their ranks."""
    found = [child for child in psutil.Process(launcher.pid).children(recursive=True) if "RANK" in environ(child)]
    return sorted(found, key=lambda process: int(environ(process)["RANK"]))


def environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def wait_for(condition, launcher: subprocess.Popen) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert launcher.poll() is None, "it ended before its time"
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line).get("step", 0) for line in lines if line.endswith("}")), default=0)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_restarts_a_run_whose_rank_was_killed_and_the_curve_is_the_same(run_trainer, tmp_path, trainer_env):
    """kill -9 of one rank under `--max-restarts`: the job goes on from its newest checkpoint by itself."""
    common = tiny("precision=fp32", "engine=zero2", "steps=40", "checkpoint.every=5", "data.trace=true")
    runs_dir = run_trainer([*common, "name=whole"], ranks=2).check().runs_dir
    command = launch_command("torchrun", 2, "trainer")
    command.insert(command.index("-m", 3), "--max-restarts=2")
    run = runs_dir / "shot"
    with subprocess.Popen(
        [*command, *common, "name=shot", f"runs_dir={runs_dir}"], cwd=tmp_path, env=trainer_env,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    ) as launcher:  # fmt: skip
        try:
            wait_for(lambda: last_step(run) >= 12, launcher)
            os.kill(ranks_of(launcher)[1].pid, signal.SIGKILL)
            assert launcher.wait(DEADLINE) == 0
        finally:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
    assert curve(runs_dir, "shot") == curve(runs_dir, "whole")
    assert samples_by_step(run) == samples_by_step(runs_dir / "whole")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_preempted_job_goes_on_with_fewer_ranks(run_trainer, tmp_path, trainer_env):
    """SIGTERM to the launcher of two ranks, then one rank alone: the curve within 1e-5, the samples identical."""
    common = tiny("precision=fp32", "steps=30", "data.trace=true")
    runs_dir = run_trainer([*common, "name=whole"]).check().runs_dir
    run = runs_dir / "moved"
    command = [*launch_command("torchrun", 2, "trainer"), *common, *HELD, "name=moved", f"runs_dir={runs_dir}"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=trainer_env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as launcher:
        wait_for(lambda: last_step(run) >= STEP, launcher)
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(DEADLINE)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "preempted" and status["exit_code"] == 75
    run_trainer([*common, "name=moved"]).check()
    reference, losses = curve(runs_dir, "whole"), curve(runs_dir, "moved")
    assert losses == pytest.approx(reference, rel=1e-5)
    assert samples_by_step(run) == samples_by_step(runs_dir / "whole")
