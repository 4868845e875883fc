"""The doctor as a user calls it, under conditions made bad on purpose."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import HERMETIC, ROOT


def environment(**changed: str | None) -> dict[str, str]:
    """This process's, with `changed`; None removes a variable."""
    path = os.pathsep.join(filter(None, (changed.pop("PYTHONPATH", None), str(ROOT))))
    whole: dict[str, str | None] = {**os.environ, **HERMETIC, "PYTHONPATH": path, **changed}
    return {name: value for name, value in whole.items() if value is not None}


def examine(
    only: str, *words: str, before: Sequence[str] = (), shell: str = "", env: Mapping[str, str | None] | None = None
) -> tuple[int, dict[str, dict[str, Any]]]:
    """(exit code, findings by name) of the doctor. `before`: a command that it is started by; `shell`: what is done
    first."""
    doctor = [sys.executable, "-m", "launch.doctor", "--json", f"only={only}", *words]
    command = [*before, "/bin/sh", "-c", f'{shell or ":"} && exec "$@"', "sh", *doctor]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**(env or {})), timeout=120)
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    return done.returncode, {finding["name"]: finding for finding in told["findings"]}


def own_mounts() -> list[str]:
    """The start of a command that may mount what no other process sees; skips the test where none may."""
    for command in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    pytest.skip("mounting needs root or user namespaces (unshare)")


def script(folder: Path, name: str, *lines: str) -> str:
    """An executable `name` in `folder`, and a PATH on which it comes first."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
