"""The local launcher with real ranks, and the commands that look after runs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch import logs, status, stop
from tests.launch.conftest import COMMON
from tests.test_survival import last_step


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_a_signal_to_the_launcher_saves_the_run_and_tells_its_exit_code(launching, tmp_path):
    """Ctrl-C at a terminal comes to the launcher alone, which tells torchrun once."""
    run = tmp_path / "runs" / "run"
    words = ("launcher.ranks=2", *COMMON, "steps=100000", "name=run")
    with launching.begun(*words, until=lambda: last_step(run) >= 2) as process:
        one = launching.state("run")
        assert one["state"] == "running" and one["steps"] == 100000 and str(one["place"]).startswith("local: host ")
        refused = launching(*words)
        assert refused.returncode == 2 and "has not ended" in refused.stderr
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) == 75, (tmp_path / "launch.log").read_text()
    assert launching.state("run")["state"] == "preempted"
    assert (run / "checkpoints" / "latest").exists()
    assert "2 x cpu" in (tmp_path / "launch.log").read_text()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run as a launcher and a rank leave it, without either."""
    folder = tmp_path / "runs" / "run"
    for name in ("launch", "logs", "heartbeats"):
        (folder / name).mkdir(parents=True)
    (folder / "config.yaml").write_text("steps: 100\n")
    (folder / "launch" / "train.yaml").write_text("steps: 100\n")
    (folder / "launch" / "launcher.yaml").write_text("_target_: launch.local.Local\n")
    return folder


def submitted(run: Path, process: subprocess.Popen[bytes]) -> None:
    created = psutil.Process(process.pid).create_time()
    handle = {"pid": process.pid, "created": created, "host": socket.gethostname(), "directory": str(run)}
    (run / "launch" / "submitted.json").write_text(json.dumps(handle))


def says(run: Path, state: str, step: int = 3) -> None:
    said = {"state": state, "step": step, "reason": f"is {state}", "exit_code": None}
    (run / "status.json").write_text(json.dumps(said))
    later = time.time() + 10
    os.utime(run / "status.json", (later, later))


def state(run: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    assert status.main([f"runs_dir={run.parent}", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    return one


def test_a_run_whose_process_has_gone_is_not_running(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        assert state(run, capsys)["state"] == "prepared"
        submitted(run, process)
        assert state(run, capsys)["state"] == "starting"
        says(run, "running")
        one = state(run, capsys)
        assert (one["state"], one["step"], one["steps"]) == ("running", 3, 100)
        beat = {"rank": 0, "host": "x", "pid": 1, "step": 8, "section": "data", "since": 0.0, "beat": time.time()}
        (run / "heartbeats" / "rank_00000.json").write_text(json.dumps(beat))
        assert state(run, capsys)["step"] == 7  # it works on the eighth
        says(run, "preempted")
        assert state(run, capsys)["state"] == "starting"  # torchrun or Slurm begins again
        says(run, "running")
        process.kill()
    assert state(run, capsys)["state"] == "gone"
    says(run, "finished", step=100)
    assert state(run, capsys)["state"] == "finished"


def test_a_run_of_another_host_is_judged_by_its_signs_of_life(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says(run, "running")
    for age, expected in ((5, "running"), (600, "gone")):
        beat = {"rank": 0, "host": "elsewhere", "pid": 1, "step": 8, "section": "data", "since": 0.0}
        (run / "heartbeats" / "rank_00000.json").write_text(json.dumps({**beat, "beat": time.time() - age}))
        assert state(run, capsys)["state"] == expected


def test_the_second_stop_is_harder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stubborn = (
        "import signal, sys, time; signal.signal(15, lambda *_: print('asked', flush=True)); print('up', flush=True)"
    )
    command = [sys.executable, "-c", f"{stubborn}\nwhile True: time.sleep(0.05)"]
    words = ["run=run", f"runs_dir={run.parent}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        submitted(run, process)
        assert stop.main(words) == 0 and "sent SIGTERM" in capsys.readouterr().out
        assert process.stdout.readline() == b"asked\n" and process.poll() is None
        assert stop.main(words) == 0 and "killed" in capsys.readouterr().out
        assert process.wait(30) == -signal.SIGKILL
    assert stop.main(words) == 0 and "has ended already" in capsys.readouterr().out
    assert stop.main(["run=nun", f"runs_dir={run.parent}"]) == 2
    assert "no such run" in (told := capsys.readouterr().err) and "runs there: run." in told


def test_the_logs_of_a_rank_or_of_the_launcher(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run=run", f"runs_dir={run.parent}"]
    (run / "logs" / "rank_00001.log").write_text("".join(f"line {n}\n" for n in range(100)))
    says(run, "finished")
    assert logs.main([*words, "rank=1", "lines=2", "--follow"]) == 0
    assert capsys.readouterr().out == "line 98\nline 99\n"
    assert logs.main([*words, "rank=7"]) == 2
    assert "ranks with a log: 1." in capsys.readouterr().err
    (run / "launch" / "slurm-1.out").write_text("from Slurm\n")
    assert logs.main(words) == 0 and capsys.readouterr().out == "from Slurm\n"


def test_a_table_of_all_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says(run, "finished", step=100)
    (run.parent / "sweep" / "one").mkdir(parents=True)
    (run.parent / "sweep" / "one" / "config.yaml").touch()
    assert status.main([f"runs_dir={run.parent}"]) == 0
    out = capsys.readouterr().out
    assert "finished" in out and "100/100" in out and "sweep/one" in out
    assert status.main(["runs_dir=nowhere"]) == 2
