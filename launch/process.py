"""A launcher's process on this host: run it, pass signals on to it, find it again, end it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

import psutil

from launch.job import Job
from trainer.errors import SetupError

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def run_here(
    job: Job, command: Sequence[str], stop: Callable[[Mapping[str, Any], bool], str] | None = None, **facts: Any
) -> int:
    """Run `command` to its end in a session of its own, so that a terminal's Ctrl-C comes to it once, by us. Its output
    goes to this process's streams.

    A first signal to this process asks it to stop, a second one ends it: by `stop(handle, hard)`, or by `end`. facts:
    for the handle. Returns the run's own exit code where it says one, for launchers know only success and failure.
    """
    before = _stamp(job)
    stop = stop or end
    with subprocess.Popen(command, start_new_session=True) as process:
        handle = {"host": socket.gethostname(), "directory": str(job.directory), **_identity(process.pid), **facts}
        told = False

        def pass_on(number: int, _: FrameType | None) -> None:
            nonlocal told
            hard, told = told, True
            try:
                done = stop(handle, hard)
            except SetupError as error:
                done = str(error)
            print(f"{signal.Signals(number).name}: {done}", file=sys.stderr, flush=True)

        previous = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
        try:
            job.remember(handle)
            code = process.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    if code != 0 and _stamp(job) != before:
        status = json.loads((job.directory / "status.json").read_text(encoding="utf-8"))
        code = status["exit_code"] or code
    return code if code >= 0 else 128 - code


def _stamp(job: Job) -> int | None:
    path = job.directory / "status.json"
    return path.stat().st_mtime_ns if path.exists() else None


def _identity(pid: int) -> dict[str, Any]:
    """A process, told from a later one of the same number."""
    return {"pid": pid, "created": psutil.Process(pid).create_time()}


def is_alive(handle: Mapping[str, Any]) -> bool | None:
    """Whether the process of `run_here` is there; None on another host."""
    return None if handle["host"] != socket.gethostname() else _find(handle) is not None


def end(handle: Mapping[str, Any], hard: bool, kills: str | None = None) -> str:
    """End the process of `run_here`: SIGTERM, or, `hard`, SIGKILL to all below it. kills: the name of a program there
    that ends what it has started elsewhere when it gets a SIGTERM. Raises SetupError on another host."""
    if handle["host"] != socket.gethostname():
        raise SetupError(f"the run was started on {handle['host']}; stop it there.")
    process = _find(handle)
    if process is None:
        return "it has ended already"
    if not hard:
        process.terminate()
        return f"sent SIGTERM to process {process.pid}"
    below = process.children(recursive=True)
    killing = [one for one in below if one.name() == kills]
    for one in killing:
        one.terminate()
    psutil.wait_procs(killing, timeout=10)
    for one in [*below, process]:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    return f"killed process {process.pid} with all below it"


def _find(handle: Mapping[str, Any]) -> psutil.Process | None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(handle["pid"])
        if abs(process.create_time() - handle["created"]) < 1 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None
