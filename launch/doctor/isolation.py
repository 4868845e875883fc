"""Each check in a process of its own, with a time limit.

`python -m launch.doctor.isolation MODULE FUNCTION SECONDS [ARGUMENT ...]` answers with its findings as JSON on what was
its standard output. It ends itself a second after its limit, should nobody be left to end it.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Literal

from launch.doctor.findings import Finding, problem, warning

CheckFunction = Callable[..., list[Finding]]


@dataclass(frozen=True)
class Check:
    """A function to call, and how.

    kind: "look": quick, beside others; "ask": waits for a network, beside everything; "measure": alone among what
    computes. seconds: its limit. if_hangs: the cure when it does not end in time. arguments: texts, its positional
    arguments. environment: set for its process.
    """

    name: str
    function: CheckFunction
    kind: Literal["look", "ask", "measure"]
    seconds: float
    if_hangs: str
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


class Running:
    """A check that has been started."""

    def __init__(self, check: Check) -> None:
        self._check = check
        function = check.function
        words = [function.__module__, function.__name__, f"{check.seconds:g}", *check.arguments]
        self._command = ["-m", "launch.doctor.isolation", *words]
        self._deadline = time.monotonic() + check.seconds
        self._process = subprocess.Popen(
            [sys.executable, *self._command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **check.environment},
            start_new_session=True,
        )

    def findings(self) -> list[Finding]:
        """Wait for them until the limit; a check that hangs or crashes is a finding."""
        check = self._check
        try:
            told, errors = self._process.communicate(timeout=max(1.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            state = warning if check.kind == "ask" else problem  # without a network one can train
            return [state(check.name, f"the check did not end within {check.seconds:g} s", check.if_hangs)]
        finally:
            self.end()
        try:
            return [Finding(**entry) for entry in json.loads(told)]
        except ValueError:
            return [self._crashed(errors.decode(errors="replace"))]

    def _crashed(self, errors: str) -> Finding:
        code = self._process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = errors.strip().splitlines()
        words = f": {lines[-1]}" if lines else ""
        return problem(
            self._check.name,
            f"the check itself ended with {how}{words}",
            f"see all that it says: {shlex.join(['python', *self._command])}",
        )

    def end(self) -> None:
        """Kill it and what it has started, if anything is left of it."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()


def run_checks(checks: Sequence[Check]) -> list[Finding]:
    """The findings of all `checks`, in their order. Measurements wait for what looks, and for each other."""
    running: dict[str, Running] = {}
    found: dict[str, list[Finding]] = {}
    try:
        for check in checks:
            if check.kind != "measure":
                running[check.name] = Running(check)
        for check in sorted(checks, key=lambda check: ("look", "measure", "ask").index(check.kind)):
            if check.kind == "measure":
                running[check.name] = Running(check)
            found[check.name] = running.pop(check.name).findings()
    finally:
        for left in running.values():
            left.end()
    return [finding for check in checks for finding in found[check.name]]


def main(argv: Sequence[str]) -> int:
    """Run the check that `argv` names, and write its findings to standard output."""
    module, function, seconds, *arguments = argv
    signal.alarm(int(float(seconds)) + 1)
    answer = os.dup(1)
    os.dup2(2, 1)  # libraries print where they like
    check: CheckFunction = getattr(import_module(module), function)
    findings = check(*arguments)
    with open(answer, "w", encoding="utf-8") as stream:
        json.dump([asdict(finding) for finding in findings], stream)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
