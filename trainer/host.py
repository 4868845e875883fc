"""What the host and its C library are told once, before the first tensor; and how much memory there is."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # glibc, malloc.h

_MANY_FILES = 1 << 16

COMPILED_PRODUCTS = 2048
"""Shapes of products of matrices for which a process keeps the compiled code; half a megabyte each."""


def allow_many_files() -> None:
    """Raise this process's limit of open files, often 1,024, as far as it may: each rank has a connection to many
    others, and reads the files that others wrote."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < highest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))


def keep_compiled_products() -> None:
    """Before the first product: let oneDNN keep what it compiled for COMPILED_PRODUCTS shapes, instead of 1,024, unless
    ONEDNN_PRIMITIVE_CACHE_CAPACITY says otherwise.

    Batches of varying lengths need more than a thousand. Compiling the others again and again took a sixth of the quick
    start's step, and what came and went tore the heap (docs/performance-log.md).
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(COMPILED_PRODUCTS))


def build_beside_the_heap() -> None:
    """Until `keep_freed_memory`: let glibc take every piece from 1 MiB on from the system, and give it back when it is
    free.

    Building and loading free more than a step needs. In the heap that would be room for the step's tensors to spread
    in: with ZeRO-2 on two ranks, 30 M parameters took 810 MB instead of 722 (`scripts/bench/planner.py`).
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


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
    """Bytes that all processes of this job may have together on this host: its memory, or less where a control group (a
    container, a Slurm job) allows less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(physical, granted_memory() or physical)


def granted_memory(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes that this process's control groups (version 1 or 2) grant, the least on the way up; None: no limit."""
    limits = []
    for folder in control_groups("memory", root, membership):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = read_or_empty(folder / name)
            if text.isdigit() and int(text) < 2**60:  # version 1 says "no limit" by a number near 2^63
                limits.append(int(text))
    return min(limits, default=None)


def group_oom_kills(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int | None:
    """Processes of this process's own control group that the system has killed for want of memory; None: none can say.
    A container that does not see its group sees the tree's root as its own."""
    groups = list(control_groups("memory", root, membership))
    for folder in (*groups[:1], *groups[-1:], root):
        text = "\n".join(read_or_empty(folder / name) for name in ("memory.events", "memory.oom_control"))
        for line in text.splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def control_groups(controller: str, root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> Iterator[Path]:
    """Folders of the control groups that `controller` holds this process in, the innermost first."""
    for line in read_or_empty(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        tree = root / controller if controllers else root  # no name: version 2, one tree for all
        folder = tree / path.lstrip("/")
        while folder != tree:
            yield folder  # a container may not see it; then it cannot be read
            folder = folder.parent
        yield tree


def read_or_empty(path: Path) -> str:
    """What a file of the system says; nothing where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
