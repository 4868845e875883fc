"""Limits of the system, lowered on purpose."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.doctor.limits import processor_quota
from tests.launch.doctor.examine import examine, own_mounts
from trainer.host import granted_memory, group_oom_kills


def test_a_tiny_dev_shm_is_a_problem():
    code, found = examine("shared_memory", before=own_mounts(), shell="mount -t tmpfs -o size=64m tmpfs /dev/shm")
    shm = found["shared-memory"]
    assert code == 1 and shm["state"] == "problem" and "67.1 MB in /dev/shm" in shm["seen"]
    assert "--shm-size" in shm["cure"]


def test_a_full_dev_shm_is_a_problem():
    fill = "mount -t tmpfs -o size=2g tmpfs /dev/shm && fallocate -l 1960m /dev/shm/left"
    code, found = examine("shared_memory", before=own_mounts(), shell=fill)
    assert code == 1 and found["shared-memory"]["state"] == "problem"


@pytest.mark.parametrize("limit, state, code", [(200, "problem", 1), (1024, "warning", 0), (8192, "ok", 0)])
def test_few_open_files(limit, state, code):
    exit_code, found = examine("ulimits", shell=f"ulimit -n {limit}")
    assert (found["open-files"]["state"], exit_code) == (state, code)
    assert str(limit) in found["open-files"]["seen"]
    assert state == "ok" or "ulimit -n 65536" in found["open-files"]["cure"]


def test_limits_on_addresses_processes_and_cores():
    lowered = ["prlimit", "--as=30720000000", "--nproc=2000", "--core=0", "--memlock=65536"]
    code, found = examine("ulimits", before=lowered)
    assert code == 1 and found["address-space"]["state"] == "problem" and "30.7 GB" in found["address-space"]["seen"]
    assert found["processes"]["state"] == "warning" and found["core-files"]["seen"] == "none are written"
    assert "ulimit -l unlimited" in found["locked-memory"]["cure"]


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_control_groups_of_version_2(tmp_path):
    """The least limit on the way up counts."""
    membership = tmp_path / "membership"
    membership.write_text("0::/job/step\n")
    write(tmp_path / "job", memory__max="4294967296\n", cpu__max="150000 100000\n")
    write(tmp_path / "job/step", memory__max="max\n", cpu__max="max 100000\n")
    write(tmp_path / "job/step", memory__events="low 0\nhigh 0\nmax 9\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert granted_memory(tmp_path, membership) == 4 << 30
    assert group_oom_kills(tmp_path, membership) == 2
    assert processor_quota(tmp_path, membership) == 1.5


def test_control_groups_of_version_1(tmp_path):
    membership = tmp_path / "membership"
    membership.write_text("9:name=systemd:/\n4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/\n")
    write(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712\n")
    write(
        tmp_path / "memory/docker/abc",
        memory__limit_in_bytes="1073741824\n",
        memory__oom_control="under_oom 0\noom_kill 1\n",
    )
    write(tmp_path / "cpu/docker/abc", cpu__cfs_quota_us="50000\n", cpu__cfs_period_us="100000\n")
    assert granted_memory(tmp_path, membership) == 1 << 30
    assert group_oom_kills(tmp_path, membership) == 1
    assert processor_quota(tmp_path, membership) == 0.5


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert granted_memory(tmp_path, tmp_path / "none") is None and group_oom_kills(tmp_path, tmp_path / "none") is None


def test_a_real_control_group(tmp_path):
    """Where this user may make one: its limit is seen from inside."""
    folder = Path("/sys/fs/cgroup/memory")
    line = next((line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line), None)
    if line is None or not os.access(folder, os.W_OK):
        pytest.skip("needs root and control groups of version 1")
    group = folder / line.split(":", 2)[2].lstrip("/") / f"doctor-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    try:
        join = f"echo {3 << 30} > {group}/memory.limit_in_bytes && echo $$ > {group}/cgroup.procs"
        code, found = examine("memory", shell=join)
        assert code == 0 and "may have 3.22 GB" in found["memory"]["seen"] and found["memory"]["state"] == "warning"
    finally:
        group.rmdir()


def test_more_threads_than_processors():
    _, found = examine("processors", env={"OMP_NUM_THREADS": "4096"})
    assert found["processors"]["state"] == "warning" and "OMP_NUM_THREADS=4096" in found["processors"]["seen"]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two processors")
def test_a_process_bound_to_one_processor():
    _, found = examine("processors", before=["taskset", "-c", str(min(os.sched_getaffinity(0)))])
    assert found["processors"]["state"] == "warning" and "bound to one" in found["processors"]["seen"]
