"""A job that hangs ends by itself and names who is late; a lost rank is named too. By real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.conftest import launch_command
from tests.test_training import tiny
from trainer import sections
from trainer.config import GuardConfig
from trainer.guards import watchdog
from trainer.guards.heartbeats import (
    Heartbeat,
    beat_seconds,
    explain_gone,
    read_heartbeats,
    who_has_gone,
    who_is_late,
    witnesses,
)

NOW = 1_000_000.0
DEADLINE = 120  # seconds until a test gives up waiting
BLOCKING = """
import os, time
from pathlib import Path
from trainer.tasks.translation import Translation

class Blocking(Translation):
    def collate(self, samples):
        while os.environ["RANK"] == "1" and Path("block").exists():
            time.sleep(0.1)
        return super().collate(samples)
"""


def beat(rank: int, section: str = "agree", step: int | None = 120, since: float = 900, beat: float = 0.5) -> Heartbeat:
    """`since` and `beat` in seconds ago."""
    return Heartbeat(rank, f"gpu-{rank}", 100 + rank, step, section, NOW - since, NOW - beat)


def late(*beats: Heartbeat, world_size: int = 0) -> str:
    return who_is_late({one.rank: one for one in beats}, world_size or len(beats), NOW, 60.0)


def test_a_rank_in_an_earlier_section_is_late():
    text = late(*(beat(rank) for rank in range(8) if rank != 3), beat(3, "data", since=905))
    assert text == (
        "rank 3 (host gpu-3, pid 103) has been in data of step 120 for 15 minutes,"
        " while 7 ranks wait for it in agree of step 120"
    )


def test_a_rank_at_an_earlier_step_is_late():
    text = late(beat(0, "save", 119, since=70), beat(1, "data"), beat(2, "data"), beat(3))
    assert text == (
        "rank 0 (host gpu-0, pid 100) has been in save of step 119 for 70 s,"
        " while 3 ranks wait for it in data of step 120 (2), agree of step 120 (1)"
    )


def test_a_rank_without_a_sign_of_life_is_to_blame_wherever_it_was():
    text = late(beat(0), beat(1, "optimizer", 120, beat=890), beat(2, "data", 120))
    assert text.startswith(
        "rank 1 (host gpu-1, pid 101) has given no sign of life for 15 minutes, since optimizer of step 120"
    )
    assert text.endswith("while 2 ranks wait for it in data of step 120 (1), agree of step 120 (1)")


def test_ranks_that_never_came_or_have_ended():
    assert late(beat(0), world_size=2).startswith("rank 1 has given no sign of life since the job began, while 1 rank")
    text = late(beat(0), beat(1, "ended: DataError: no such file", beat=300))
    assert text.startswith("rank 1 (host gpu-1, pid 101) has ended: DataError: no such file")
    assert "run directory" in late(world_size=4)


def test_nobody_is_behind():
    text = late(beat(0), beat(1, since=300))
    assert text.startswith("all 2 ranks have been in agree of step 120 for 5 minutes and wait for each other")
    assert late(beat(0, "start-up", None)) == "rank 0 (host gpu-0, pid 100) has been in start-up for 15 minutes"


def test_many_ranks_are_counted():
    text = late(*(beat(rank, beat=900) for rank in range(1, 100)), beat(0))
    assert "rank 8 " in text and "rank 9 " not in text and "and 91 more, while 1 rank waits for it" in text


def test_heartbeats_of_an_earlier_start_do_not_count(tmp_path):
    for one in (beat(0), beat(1, beat=500), beat(7)):
        one.write(tmp_path / "heartbeats")
    (tmp_path / "heartbeats" / "rank_00002.json").write_text("half a li")
    assert read_heartbeats(tmp_path / "heartbeats", world_size=4, after=NOW - 400) == {0: beat(0)}


@pytest.mark.parametrize("world_size", [1, 2, 31, 32, 1000, 16_384])
def test_some_ranks_of_a_large_job_look_at_all_and_all_of_a_small_one(world_size):
    """Or every rank of thousands would read a file of every other at the same time."""
    chosen = witnesses(world_size)
    assert 0 in chosen and len(chosen) <= 32
    assert world_size >= 32 or list(chosen) == list(range(world_size))
    assert len({rank // 8 for rank in chosen}) >= min(16, -(-world_size // 8))  # on hosts of their own
    assert world_size / beat_seconds(world_size) < 4000 and 1 <= beat_seconds(world_size) <= 5


def test_a_rank_that_is_no_witness_does_not_speak(monkeypatch):
    monkeypatch.setattr(watchdog, "_WITNESS_SECONDS", 0.0)
    monkeypatch.setattr(watchdog, "beat_seconds", lambda _: 0.0)
    error = watchdog.explain_lost_peer(watchdog._Watched(rank=3, world_size=1024), "Connection reset by peer")
    assert not error.speaks and "Connection reset" in str(error)


def test_who_has_gone():
    before = {0: beat(0), 1: beat(1), 2: beat(2), 3: beat(3)}
    beats = {
        0: beat(0, beat=0.1),
        1: beat(1),
        2: beat(2, "ended: PeerError: lost", beat=0.1),
        3: beat(3, "ended: KeyError: 'text'", beat=0.1),
    }
    gone = who_has_gone(before, beats, world_size=5)
    assert gone == [beats[1], beats[3], 4]
    assert "rank 3 (host gpu-3, pid 103) has ended: KeyError: 'text'" in explain_gone(gone, NOW)


def test_the_out_of_memory_killer_is_suspected_where_memory_was_scarce(monkeypatch):
    monkeypatch.setattr(watchdog, "oom_kills", lambda: 0)
    facts = (1, "gpu-1", 101, 7, "optimizer", NOW - 2, NOW - 1)
    scarce, ample = (Heartbeat(*facts, 48 << 30, free, 64 << 30) for free in (1 << 30, 32 << 30))
    watched = watchdog._Watched()
    assert watchdog._out_of_memory(watched, [ample, 3]) == ""
    text = watchdog._out_of_memory(watched, [scarce])
    assert "rank 1 held 48.0 GiB, and 1.0 of 64.0 GiB of gpu-1 were left" in text


def test_the_time_outs():
    watched = watchdog._Watched(guard=GuardConfig(start_seconds=50, step_seconds=10), first_step=5)
    limits = {}
    for name, step in (("start-up", None), ("data", 5), ("data", 6), ("evaluate", 5), ("save", 9)):
        watched.mark = (name, step, 0.0)
        limits[name, step] = watchdog._limit(watched)[1]
    assert list(limits.values()) == [50, 50, 10, 40, 40]
    watched.guard = GuardConfig(start_seconds=None, step_seconds=None)
    assert watchdog._limit(watched)[1] is None
    assert watchdog.collective_seconds(GuardConfig()) > 4 * 900


def test_a_mark_costs_next_to_nothing():
    watched = watchdog._Watched()
    with sections.told_to(watched.hear):
        started = time.perf_counter()
        for step in range(10_000):
            sections.enter("data", step)
        assert time.perf_counter() - started < 0.5
    assert watched.mark[:2] == ("data", 9_999) and watched.first_step == 0


class Job:
    """Two ranks under torchrun that train for as long as they are let."""

    def __init__(self, launcher: subprocess.Popen[bytes], run: Path, errors: Path) -> None:
        self.launcher, self.run, self.errors = launcher, run, errors

    def heartbeat(self, rank: int) -> Heartbeat:
        return read_heartbeats(self.run / "heartbeats", 2, 0)[rank]

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, self.told
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        def passed() -> bool:
            assert self.launcher.poll() is None, self.told
            beats = read_heartbeats(self.run / "heartbeats", 2, 0)
            return len(beats) == 2 and all((one.step or 0) >= step for one in beats.values())

        self.wait_until(passed)

    def signal(self, rank: int, number: int) -> int:
        """Send it; returns the process id."""
        pid = self.heartbeat(rank).pid
        os.kill(pid, number)
        return pid

    @property
    def told(self) -> str:
        return self.errors.read_text()

    def status(self) -> dict:
        return json.loads((self.run / "status.json").read_text())


@pytest.fixture
def start(tmp_path, trainer_env):
    @contextmanager
    def starting(*words: str) -> Iterator[Job]:
        command = launch_command("torchrun", 2, "trainer")
        common = tiny("precision=fp32", "steps=100000", "name=run", f"runs_dir={tmp_path}", "checkpoint.every=0")
        environment = {**trainer_env, "PYTHONPATH": f"{trainer_env['PYTHONPATH']}:{tmp_path}"}
        with (tmp_path / "stderr").open("wb") as errors, subprocess.Popen(
            [*command, *common, *words], cwd=tmp_path, env=environment,
            stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
        ) as launcher:  # fmt: skip
            try:
                yield Job(launcher, tmp_path / "run", tmp_path / "stderr")
            finally:
                if launcher.poll() is None:
                    os.killpg(launcher.pid, signal.SIGKILL)
                for path in (tmp_path / "run" / "heartbeats").glob("rank_*.json"):
                    try:
                        os.kill(json.loads(path.read_text())["pid"], signal.SIGKILL)
                    except ProcessLookupError:
                        continue

    return starting


@pytest.mark.dist
def test_a_stopped_rank_is_named_and_the_job_ends(start):
    with start("guard.step_seconds=8", "guard.start_seconds=60") as job:
        job.wait_for_step(3)
        pid = job.signal(1, signal.SIGSTOP)
        job.wait_until(lambda: "hang: " in job.told and job.status()["state"] == "failed")
        os.kill(pid, signal.SIGKILL)  # the launcher would wait 30 s for it
        assert job.launcher.wait(DEADLINE) != 0
        assert "exitcode  : 76" in job.told
        stopped, status = job.heartbeat(1), job.status()
    assert status["exit_code"] == 76 and status["reason"].startswith("hang: rank 1 (host ")
    assert f"pid {pid}) has given no sign of life for" in status["reason"]
    assert f"since {stopped.where}: the process was stopped" in status["reason"]
    assert "Noticed by rank 0" in status["reason"] and "(guard.step_seconds)" in status["reason"]
    stacks = (job.run / "logs" / "stacks_rank_00000.txt").read_text()
    assert "in fit" in stacks and "rank 0 pid" in stacks


@pytest.mark.dist
def test_a_rank_whose_data_do_not_come_is_named(start, tmp_path):
    (tmp_path / "blocking.py").write_text(BLOCKING)
    words = ("task._target_=blocking.Blocking", "allow_targets=[blocking.]")
    with start("guard.step_seconds=6", "guard.start_seconds=60", *words) as job:
        job.wait_for_step(3)
        (tmp_path / "block").touch()
        assert job.launcher.wait(DEADLINE) != 0
        status = job.status()
    assert status["reason"].startswith("hang: rank 1 (host ") and status["exit_code"] == 76
    assert ") has been in data of step " in status["reason"]
    assert "while 1 rank waits for it in agree of step " in status["reason"]
    assert "in collate" in (job.run / "logs" / "stacks_rank_00001.txt").read_text()


@pytest.mark.dist
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_named(start, killed):
    with start() as job:
        job.wait_for_step(2)
        pid = job.signal(killed, signal.SIGKILL)
        assert job.launcher.wait(DEADLINE) != 0
        status = job.status()
    assert status["state"] == "failed" and status["exit_code"] == 76
    assert status["reason"].startswith(f"lost a peer: rank {killed} (host ")
    assert f"pid {pid}) has given no sign of life" in status["reason"]
    assert f"error: lost a peer: rank {killed} " in job.told and "RuntimeError" not in job.told


@pytest.mark.dist
def test_ranks_do_not_outlive_their_launcher(start):
    with start() as job:
        job.wait_for_step(2)
        pids = [job.heartbeat(rank).pid for rank in (0, 1)]
        job.launcher.kill()
        job.launcher.wait()
        job.wait_until(lambda: not any(running(pid) for pid in pids))
        status = job.status()
    assert (status["state"], status["exit_code"]) == ("failed", 76)
    assert (
        status["reason"].startswith(f"the launcher (pid {job.launcher.pid}) has gone") and status["reason"] in job.told
    )


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.dist
def test_no_false_alarm(run_trainer):
    words = tiny("steps=6", "name=run", "guard.step_seconds=20", "eval.every=3", "eval.max_samples=8")
    done = run_trainer(words, ranks=2).check()
    run = done.runs_dir / "run"
    assert not list((run / "logs").glob("stacks*")) and "hang" not in done.output
    for rank in range(2):
        told = json.loads((run / "heartbeats" / f"rank_{rank:05d}.json").read_text())
        assert told["section"] == "ended" and told["step"] == 6 and told["rank"] == rank
