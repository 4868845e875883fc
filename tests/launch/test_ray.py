"""Ray Train on this host: two ranks that train together, lose one, go on, and stop when they are told to."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from launch.__main__ import main
from tests.launch.conftest import COMMON, Launching, same_as


def test_without_ray_a_launch_is_refused_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.ray.find_spec", lambda name: None)
    assert main(["launcher=ray", "experiment=digits_mlp"]) == 2
    assert "install shardwright[ray]" in capsys.readouterr().err


def test_a_dry_run_says_what_ray_will_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["launcher.ranks=4", "launcher.gpus_per_rank=1", "launcher.resources={tpu: 0.5}", "dry_run=true"]
    assert main(["launcher=ray", "experiment=digits_mlp", *words]) == 0
    folder = tmp_path / "runs/digits_mlp/launch"
    facts = json.loads((folder / "ray.json").read_text())
    assert facts["resources"] == {"CPU": 1, "GPU": 1, "tpu": 0.5}
    assert (facts["workers"], facts["cwd"], facts["max_failures"]) == (4, str(tmp_path), 3)
    assert os.access(folder / "run.sh", os.X_OK)


@pytest.mark.dist
@pytest.mark.slow
def test_a_rank_that_is_killed_begins_again_and_a_stop_is_a_save(
    launching: Launching, tmp_path: Path, whole: Path
) -> None:
    pytest.importorskip("ray")
    launching.env |= {"HOME": str(tmp_path)}  # Ray keeps a token there
    launching.env |= {"RAY_memory_monitor_refresh_ms": "0"}  # it ends its workers where others fill the host's memory
    run = tmp_path / "runs" / "ray"
    words = [*COMMON, "name=ray", "checkpoint.every=4", "launcher=ray", "launcher.ranks=2"]

    def saved(step: int) -> bool:
        return (run / "checkpoints" / f"step_{step:08d}" / "manifest.json").exists()

    with launching.begun(*words, until=lambda: saved(4)) as launcher:
        os.kill(_rank(run, 1), signal.SIGKILL)
        assert launcher.wait(180) == 0, (tmp_path / "launch.log").read_text()
    assert json.loads((run / "plan.json").read_text())["world_size"] == 2
    assert "resumed" in (run / "metrics.jsonl").read_text()
    same_as(whole, run)
    steps = "steps=100000"
    with launching.begun(*words, steps, until=lambda: saved(20)) as launcher:
        launcher.terminate()
        assert launcher.wait(120) == 75, (tmp_path / "launch.log").read_text()
    assert json.loads((run / "status.json").read_text())["state"] == "preempted"
    told = (tmp_path / "launch.log").read_text()
    assert "resuming       after step" in told and "State API" not in told, told


def _rank(run: Path, rank: int) -> int:
    """The process of a rank, by what it says of itself."""
    beat = json.loads((run / "heartbeats" / f"rank_{rank:05d}.json").read_text())
    assert "trainer" in " ".join(psutil.Process(beat["pid"]).cmdline())
    return int(beat["pid"])
