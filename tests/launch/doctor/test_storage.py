"""Disks that are full, slow to say so, or not to be written to."""

from __future__ import annotations

import os

import pytest

from launch.doctor import storage
from tests.launch.doctor.examine import examine, own_mounts


def test_a_disk_is_measured_and_nothing_stays(tmp_path):
    code, found = examine("disk", f"runs_dir={tmp_path}/runs/deep")
    assert found["disk"]["state"] in ("ok", "warning") and code == 0
    figures = found["disk-speed"]["figures"]
    assert figures["write_bytes_per_second"] > 1e5 and figures["read_bytes_per_second"] > 1e5
    assert not os.listdir(tmp_path), "it makes no folder and leaves no file"


def test_a_full_disk_is_a_problem(tmp_path):
    fill = f"mount -t tmpfs -o size=4m tmpfs {tmp_path} && (cat /dev/zero > {tmp_path}/old 2>/dev/null; true)"
    code, found = examine("disk", f"runs_dir={tmp_path}/runs", before=own_mounts(), shell=fill)
    assert code == 1 and "No space left" in found["disk"]["seen"] and "runs_dir=" in found["disk"]["cure"]


def test_little_room_is_a_problem_that_says_for_what(tmp_path):
    mount = f"mount -t tmpfs -o size=64m tmpfs {tmp_path}"
    code, found = examine("disk", f"runs_dir={tmp_path}", before=own_mounts(), shell=mount)
    assert code == 1 and "67.1 MB free" in found["disk"]["seen"] and "(tmpfs)" in found["disk"]["seen"]
    assert "12 bytes a parameter" in found["disk"]["cure"]


def test_no_files_left_is_a_problem(tmp_path):
    mount = f"mount -t tmpfs -o size=2g,nr_inodes=50 tmpfs {tmp_path}"
    code, found = examine("disk", f"runs_dir={tmp_path}", before=own_mounts(), shell=mount)
    assert code == 1 and "more files" in found["disk"]["seen"]


@pytest.mark.parametrize("place", ["/proc/runs", "{file}/runs"])
def test_a_place_that_takes_no_files_is_a_problem(tmp_path, place):
    (tmp_path / "file").write_text("")
    code, found = examine("disk", f"runs_dir={place.format(file=tmp_path / 'file')}")
    assert code == 1 and "takes no files" in found["disk"]["seen"]


def test_a_slow_disk_is_a_warning_that_says_what_it_costs(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "_speed", lambda folder, most: (20e6, 500e6))
    found = {finding.name: finding for finding in storage.disk(str(tmp_path))}["disk-speed"]
    assert found.state == "warning" and "70 minutes" in found.cure


def test_caches_that_cannot_be_used(tmp_path):
    mount = f"mount -t tmpfs -o size=8g,noexec tmpfs {tmp_path}"
    env = {"TMPDIR": "/proc/nowhere", "HF_HOME": "/proc/nowhere", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    code, found = examine("caches", before=own_mounts(), shell=mount, env=env)
    assert code == 1 and found["temporary"]["state"] == found["hub-cache"]["state"] == "problem"
    assert "set HF_HOME" in found["hub-cache"]["cure"]
    assert found["build-cache"]["state"] == "warning" and "noexec" in found["build-cache"]["seen"]
