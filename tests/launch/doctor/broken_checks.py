"""Checks that hang, crash, or print where they should not."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from launch.doctor.findings import Finding, ok


def hangs(pid_file: str) -> list[Finding]:
    """And has started a process."""
    sleeper = subprocess.Popen(["sleep", "600"])
    Path(pid_file).write_text(str(sleeper.pid))
    time.sleep(600)
    return []


def aborts() -> list[Finding]:
    os.abort()


def raises() -> list[Finding]:
    raise RuntimeError("the driver is not loaded")


def chatters() -> list[Finding]:
    print("[W] a library's own line", flush=True)
    os.write(1, b"and one from C\n")
    return [ok("chatters", "fine", figures={"seconds": 1.5})]
