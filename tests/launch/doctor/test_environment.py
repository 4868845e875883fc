"""Settings of the environment that spoil a run."""

from __future__ import annotations

from tests.launch.doctor.examine import examine


def test_a_locale_without_utf8():
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, found = examine("locale", env=ascii_only)
    assert code == 0 and found["locale"]["state"] == "warning" and "C.UTF-8" in found["locale"]["cure"]
    assert examine("locale", env={"LC_ALL": "C.UTF-8"})[1]["locale"]["state"] == "ok"


def test_switches_left_on():
    _, found = examine("settings", env={"CUDA_LAUNCH_BLOCKING": "1", "NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "0"})
    assert found["settings"]["state"] == "warning"
    assert "unset CUDA_LAUNCH_BLOCKING NCCL_P2P_DISABLE, unless" in found["settings"]["cure"]
