"""The Slurm launcher: what it writes, and real jobs on a real Slurm."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.conftest import Finished, run_command
from tests.test_survival import last_step
from tests.test_training import curve, samples_by_step, tiny

COMMON = tiny("precision=fp32", "steps=30", "data.trace=true", "logging=[console]")


def launch_on(cluster, trainer_env, tmp_path: Path, *words: str, module: str = "launch") -> Finished:
    command = [sys.executable, "-m", module, *words]
    done = run_command(command, tmp_path, {**trainer_env, "SLURM_CONF": cluster.env["SLURM_CONF"]}, 120)
    return Finished(done.returncode, done.stdout, done.stderr, tmp_path / "runs")


def output(run: Path) -> str:
    return "".join(path.read_text() for path in sorted((run / "launch").glob("slurm-*.out")))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_job_is_preempted_requeued_and_goes_on(cluster, run_trainer, trainer_env, tmp_path):
    """SIGUSR1 to every process of two ranks, and to the batch script, which passes it on: one save, requeue, resume."""
    runs_dir = run_trainer([*COMMON, "name=whole"], ranks=2).check().runs_dir
    words = ["launcher=slurm", "launcher.ranks_per_node=2", *COMMON, "name=shot"]
    done = launch_on(cluster, trainer_env, tmp_path, *words).check()
    run, job = runs_dir / "shot", re.search(r"job (\d+)", done.stdout)[1]
    cluster.wait_for(lambda: last_step(run) >= 6, lambda: output(run))
    cluster.call("scancel", "--signal=USR1", "--full", job)
    cluster.wait_for(lambda: cluster.state(job) in ("COMPLETED", "FAILED"), lambda: output(run))
    assert cluster.state(job) == "COMPLETED", output(run)
    assert "after step " in output(run) and "preempted" in output(run)
    assert curve(runs_dir, "shot") == curve(runs_dir, "whole")
    assert samples_by_step(run) == samples_by_step(runs_dir / "whole")
