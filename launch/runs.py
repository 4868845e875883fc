"""How the runs in a folder stand: what they say of themselves, and whether what was launched is still there."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from launch.job import Job
from launch.prepare import frozen_config, said, submitted
from trainer.config import differences
from trainer.errors import CheckpointError, ConfigError
from trainer.guards.heartbeats import Heartbeat, read_heartbeats
from trainer.impossible import is_run_name
from trainer.run_directory import RunDirectory

SILENT_SECONDS = 60.0
"""Without a sign of life of rank 0 for so long, where no launcher can be asked: the run is gone."""


@dataclass(frozen=True)
class RunState:
    """How a run stands.

    state: prepared (by a dry run), starting (submitted or to start again, and not yet running), running, finished,
    preempted, failed, or gone: it never said that it ended, and there is no process or job of it. step: the last one
    known; steps: of the configuration; age: seconds since the last sign of it; place: the launcher and what it
    submitted.
    """

    run: str
    state: str
    step: int
    steps: int | None
    age: float
    place: str
    reason: str

    @property
    def over(self) -> bool:
        """Whether nothing of the run is there any more."""
        return self.state not in ("starting", "running")


def check_free(job: Job) -> None:
    """Refuse a name under which something runs or waits already, here or in a queue. Raises CheckpointError, or
    ConfigError with the difference where what was submitted has another configuration and has not begun yet."""
    if not _is_run(job.directory):
        return
    now = state_of(job.directory, job.name)
    if not now.over:
        raise CheckpointError(
            f"name={job.name}: this run has been started already and has not ended ({now.state}; {now.place}). Look at"
            f" it with python -m launch.status, or stop it: python -m launch.stop run={job.name}"
        )
    if (job.folder / "submitted.json").exists() and not RunDirectory(job.directory).config.exists():
        changed = differences(frozen_config(job.folder), job.config)
        if changed:
            raise ConfigError(
                f"{job.directory} was submitted with another configuration; choose another name=..., or undo the"
                " difference:\n  " + "\n  ".join(changed)
            )


def run_directory(name: str, runs_dir: str) -> Path:
    """The folder of a run that has been launched or begun. Raises CheckpointError, with the runs there are."""
    folder = Path(runs_dir) / name
    if not is_run_name(name) or not _is_run(folder):
        known = ", ".join(str(path.relative_to(runs_dir)) for path in find_runs(runs_dir)) or "none"
        raise CheckpointError(f"run={name}: there is no such run in runs_dir={runs_dir}; runs there: {known}.")
    return folder


def find_runs(runs_dir: str) -> Iterator[Path]:
    """The folders of runs (NAME or A/B) below `runs_dir`, by name."""
    root = Path(runs_dir)
    yield from sorted(path for pattern in ("*", "*/*") for path in root.glob(pattern) if _is_run(path))


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or (folder / "launch" / "train.yaml").is_file()


def state_of(folder: Path, name: str) -> RunState:
    """How the run in `folder` stands now."""
    status, place, alive = _read_status(folder), "", None
    launched = folder / "launch" / "submitted.json"
    if launched.exists():
        try:
            launcher, handle = submitted(launched.parent)
            alive, place = launcher.alive(handle), f"{type(launcher).__name__.lower()}: {said(handle)}"
        except CheckpointError as error:
            place = str(error)
    beats = [*read_heartbeats(folder / "heartbeats", 1, 0.0).values()]
    if alive is None:
        alive = any(_may_live(beat) for beat in beats if not beat.ended)
        place = place or "".join(beat.who for beat in beats)
    steps = [beat.step for beat in beats if beat.step is not None and not beat.ended]
    signs = [folder / "status.json", launched, folder / "metrics.jsonl", folder / "heartbeats" / "rank_00000.json"]
    seen = max((path.stat().st_mtime for path in signs if path.exists()), default=folder.stat().st_mtime)
    return RunState(
        run=name,
        state=_state(status, alive, launched),
        step=max([status.get("step", 0), *(step - 1 for step in steps)]),
        steps=_steps(folder),
        age=max(0.0, time.time() - seen),
        place=place,
        reason=status.get("reason", ""),
    )


def _state(status: dict[str, Any], alive: bool, launched: Path) -> str:
    said_so = str(status.get("state", ""))
    before = bool(status) and launched.exists() and status["written"] < launched.stat().st_mtime
    if alive:
        return said_so if said_so in ("running", "finished") and not before else "starting"
    if said_so == "running" or before:
        return "gone"
    return said_so or ("gone" if launched.exists() else "prepared")


def _read_status(folder: Path) -> dict[str, Any]:
    """status.json with when it was `written` (Unix time); {} where there is none."""
    with suppress(OSError, ValueError):
        written = (folder / "status.json").stat().st_mtime
        return {**RunDirectory(folder).read_status(), "written": written}
    return {}


def _may_live(rank: Heartbeat) -> bool:
    gone = rank.host == socket.gethostname() and not psutil.pid_exists(rank.pid)
    return not gone and time.time() - rank.beat < SILENT_SECONDS


def _steps(folder: Path) -> int | None:
    for path in (folder / "config.yaml", folder / "launch" / "train.yaml"):
        with suppress(OSError, yaml.YAMLError, AttributeError, TypeError, ValueError):
            return int(yaml.safe_load(path.read_text(encoding="utf-8")).get("steps"))
    return None
