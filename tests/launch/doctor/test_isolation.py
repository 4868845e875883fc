"""A check that hangs or crashes is a finding, and stops no other."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launch.doctor.findings import ok
from launch.doctor.isolation import Check, run_checks
from tests.launch.doctor import broken_checks
from tests.launch.doctor.examine import environment


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])


def check(function, seconds=30.0, arguments=(), kind="look"):
    return Check(f"{function.__name__} {kind}", function, kind, seconds, "reboot it", arguments)


def test_crashes_and_hangs_are_findings(tmp_path):
    functions = [broken_checks.aborts, broken_checks.raises, broken_checks.chatters]
    started = time.monotonic()
    hanging = [check(broken_checks.hangs, 6, (str(tmp_path / kind),), kind) for kind in ("look", "ask")]
    found = run_checks([*hanging, *map(check, functions)])
    assert time.monotonic() - started < 60
    hung, silent, aborted, raised, chattered = found
    assert hung.state == "problem" and hung.seen == "the check did not end within 6 s" and hung.cure == "reboot it"
    assert silent.state == "warning", "one can train without a network"
    assert aborted.state == "problem" and "SIGABRT" in aborted.seen
    assert raised.state == "problem" and "RuntimeError: the driver is not loaded" in raised.seen
    assert "python -m launch.doctor.isolation tests.launch.doctor.broken_checks raises" in raised.cure
    assert chattered == ok("chatters", "fine", figures={"seconds": 1.5})
    started_by_them = [int((tmp_path / kind).read_text()) for kind in ("look", "ask")]
    deadline = time.monotonic() + 30  # a killed process takes a moment to be gone
    while any(map(running, started_by_them)):
        assert time.monotonic() < deadline, "what it had started is ended with it"
        time.sleep(0.02)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
