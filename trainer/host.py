"""What the host and its C library are told once, before the first tensor."""

from __future__ import annotations

import ctypes
import platform
import resource

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
