"""What the host and its C library are told once, before the first tensor; and how much memory there is."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
from contextlib import suppress
from pathlib import Path

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # glibc, malloc.h


_MANY_FILES = 1 << 16


def allow_many_files() -> None:
    """Raise this process's limit of open files, often 1,024, as far as it may: each rank has a connection to many
    others, and reads the files that others wrote."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < highest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))


def return_freed_memory() -> None:
    """Give back to the system, once, what building or loading needed for a moment."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next step, instead of returning it to the system page by page.

    Tensors on a CPU come and go with every step; giving their pages back and taking them again costs about 4 % of a
    small model's step. Other C libraries keep their ways.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most it takes
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        libc.mallopt(_M_TOP_PAD, 64 << 20)


def memory_limit() -> int:
    """Bytes that all processes of this job may have together on this host: its memory, or less where the control group
    (a container, a Slurm job) allows less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    paths = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in ("", "memory"):
                file = "memory.limit_in_bytes" if controllers else "memory.max"
                paths.append(Path(f"/sys/fs/cgroup/{controllers}/{group}/{file}"))
    for path in paths:
        with suppress(OSError, ValueError):  # "max" where there is no limit
            limits.append(int(path.read_text()))
    return min(limits)
