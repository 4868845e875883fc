"""What the system lets this user have: shared memory, open files, locked memory, memory, processors."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from launch.doctor.findings import Finding, gigabytes, ok, problem, skipped, warning
from trainer.host import CGROUPS, MEMBERSHIP, control_groups, granted_memory, group_oom_kills, read_or_empty

_LEAST_SHARED, _GOOD_SHARED = 100e6, 1e9
"""Bytes. Docker's default of 64 MB breaks NCCL and loaders: ranks and workers pass batches and rings through it."""


def shared_memory(folder: str = "/dev/shm") -> list[Finding]:
    """Room in /dev/shm, through which ranks and loader workers of one machine talk."""
    name = "shared-memory"
    cure = (
        "in a container: docker run --ipc=host or --shm-size=16g; in Kubernetes an emptyDir with medium: Memory at"
        " /dev/shm; else mount -o remount,size=50% /dev/shm, and remove files that dead processes left there"
    )
    try:
        room = shutil.disk_usage(folder)
    except OSError as error:
        return [problem(name, f"{folder}: {error.strerror}", f"mount a tmpfs at {folder}")]
    seen = f"{gigabytes(room.free)} free of {gigabytes(room.total)} in {folder}"
    if room.free < _LEAST_SHARED:
        return [problem(name, seen, cure)]
    return [warning(name, seen, cure) if room.free < _GOOD_SHARED else ok(name, seen)]


def ulimits() -> list[Finding]:
    """Open files, locked memory, processes, address space, core files."""
    return [_open_files(), _locked_memory(), *_processes(), *_address_space(), _core_files()]


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    seen = f"{_limit(soft)} at once (hard limit {_limit(hard)})"
    cure = "ulimit -n 65536 before the launch; for good in /etc/security/limits.conf, LimitNOFILE= or --ulimit nofile="
    least, good = 256, 4096  # a rank opens a socket to each other rank, a file a shard, and pipes to workers
    if _below(soft, least):
        return problem("open-files", seen, cure)
    return warning("open-files", seen, cure) if _below(soft, good) else ok("open-files", seen)


def _locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    seen = "unlimited" if soft == resource.RLIM_INFINITY else gigabytes(soft)
    if not _below(soft, 2**30):
        return ok("locked-memory", seen)
    cure = "ulimit -l unlimited; in a container --ulimit memlock=-1, in a service LimitMEMLOCK=infinity"
    if has_infiniband():
        return problem("locked-memory", f"{seen}: InfiniBand cannot register its buffers", cure)
    return ok("locked-memory", f"{seen}, enough without InfiniBand; engine=zero3_nvme locks 1 GB a rank", cure)


def has_infiniband() -> bool:
    """Whether this machine has InfiniBand or RoCE adapters."""
    folder = Path("/sys/class/infiniband")
    return folder.is_dir() and any(folder.iterdir())


def _processes() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if _below(soft, 4096):
        cure = "ulimit -u 65536: threads count too, and a rank has dozens"
        yield warning("processes", f"{_limit(soft)} processes and threads for this user", cure)


def _address_space() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        cure = "ulimit -v unlimited: CUDA reserves far more addresses than it uses"
        yield problem("address-space", f"limited to {gigabytes(soft)}", cure)


def _core_files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
    if soft == 0:
        return ok("core-files", "none are written", "ulimit -c unlimited while hunting a crash, with room for them")
    return ok("core-files", f"written on a crash, {_limit(soft)}: each as large as the memory of its rank")


def _below(value: int, least: int) -> bool:
    return value != resource.RLIM_INFINITY and value < least


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def memory() -> list[Finding]:
    """Memory of the host, and what its control group grants of it."""
    facts = dict(line.split(":") for line in read_or_empty(Path("/proc/meminfo")).splitlines())
    if "MemAvailable" not in facts:
        return [skipped("memory", "there is no /proc/meminfo to read")]
    host, free = (1024 * int(facts[key].split()[0]) for key in ("MemTotal", "MemAvailable"))
    limit, killed = granted_memory(), group_oom_kills() or 0
    seen = f"{gigabytes(free)} free of {gigabytes(host)}"
    cure = (
        "give the container or job more (docker --memory, Kubernetes resources.limits.memory, sbatch --mem), or plan"
        " for less; exit code -9 without a word is this limit"
    )
    if limit is not None and limit < host:
        seen += f"; this control group may have {gigabytes(limit)}"
    least = min(free, limit or free)
    if killed:
        return [warning("memory", f"{seen}; the system has killed {killed} processes of it for want of memory", cure)]
    if least < 2e9:
        return [problem("memory", seen, cure)]
    return [warning("memory", seen, cure) if limit is not None and limit < 0.5 * host else ok("memory", seen)]


def processors() -> list[Finding]:
    """Processors that this process may use, and threads that it would start."""
    here, mine, quota = os.cpu_count() or 1, len(os.sched_getaffinity(0)), processor_quota()
    seen = f"{mine} of {here}" + ("" if quota is None else f", for {quota:g} processors' time")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if quota is not None and quota < mine:
        cure = f"set OMP_NUM_THREADS={max(1, int(quota))}, since more threads are stopped; or docker --cpus={mine}"
        if not (threads.isdigit() and int(threads) <= quota):
            return [warning("processors", seen, cure)]
    if threads.isdigit() and int(threads) > mine:
        return [
            warning("processors", f"{seen}, and OMP_NUM_THREADS={threads}", f"set OMP_NUM_THREADS to {mine} or less")
        ]
    if mine == 1 < here:
        cure = "start it without taskset; in Slurm --cpus-per-task, with several ranks a share each"
        return [warning("processors", f"{seen}: this process is bound to one", cure)]
    return [ok("processors", seen)]


def processor_quota(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """Processors' worth of time that this process's control groups grant, the least; None: no limit."""
    quotas = []
    for folder in control_groups("cpu", root, membership):
        words = read_or_empty(folder / "cpu.max").split() or [
            read_or_empty(folder / "cpu.cfs_quota_us"),
            read_or_empty(folder / "cpu.cfs_period_us"),
        ]
        if all(word.isdigit() for word in words) and len(words) == 2:  # "max" and -1 are no limit
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)
