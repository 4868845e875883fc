"""Room and speed of the disk that runs are written to, and the folders of caches."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from launch.doctor.findings import Finding, gigabytes, ok, problem, warning

_BYTES_A_PARAMETER = 12  # of a checkpoint: fp32 master and two moments of Adam
_CHECKPOINTS = 3  # the two that are kept, and the one being written
_LEAST_FREE, _GOOD_FREE = 1e9, 20e9
_GOOD_BYTES_PER_SECOND = 100e6
_CHUNK, _MOST, _SECONDS = 8 << 20, 256 << 20, 1.0


def disk(runs_dir: str) -> list[Finding]:
    """Room in `runs_dir`, then a file written there, synchronised and read back; nothing of it stays."""
    asked = Path(runs_dir).absolute()
    folder = next(path for path in (asked, *asked.parents) if path.exists())  # it is made by the first run
    where = f"{asked} ({_file_system(folder)})"
    try:
        room = os.statvfs(folder)
    except OSError as error:
        return [problem("disk", f"{where}: {error.strerror}", "choose another folder: runs_dir=...")]
    free = room.f_bavail * room.f_frsize
    try:
        written, read = _speed(folder, min(_MOST, free // 4))
    except OSError as error:
        cure = "choose a folder that this user may write to, with room: runs_dir=/large/disk/runs"
        return [problem("disk", f"{where} takes no files: {error.strerror}; {gigabytes(free)} free", cure)]
    return [_room(where, free, room.f_favail if room.f_files else None), _pace(where, written, read)]


def _room(where: str, free: float, files_free: int | None) -> Finding:
    parameters = free / (_BYTES_A_PARAMETER * _CHECKPOINTS)
    seen = f"{gigabytes(free)} free in {where}: checkpoints of up to {parameters / 1e9:.2g} B parameters"
    cure = (
        f"make room, or runs_dir=/large/disk/runs: a run needs {_BYTES_A_PARAMETER} bytes a parameter for each"
        f" checkpoint, {_CHECKPOINTS} of them with checkpoint.keep=2"
    )
    if files_free is not None and files_free < 1000:
        return problem(
            "disk", f"{where} can hold {files_free} more files", "remove files, of any size, or change runs_dir"
        )
    if free < _LEAST_FREE:
        return problem("disk", seen, cure)
    return warning("disk", seen, cure) if free < _GOOD_FREE else ok("disk", seen)


def _pace(where: str, written: float, read: float) -> Finding:
    name, figures = "disk-speed", {"write_bytes_per_second": written, "read_bytes_per_second": read}
    minutes = 7e9 * _BYTES_A_PARAMETER / written / 60
    seen = f"writes {gigabytes(written)}/s to {where}, reads {gigabytes(read)}/s"
    if written >= _GOOD_BYTES_PER_SECOND:
        return ok(name, seen, figures=figures)
    cure = (
        f"runs_dir= on a local or parallel disk, with checkpoint.remote for copies: saving 7 B parameters takes"
        f" {minutes:.0f} minutes here"
    )
    return warning(name, seen, cure, figures)


def _speed(folder: Path, most: int) -> tuple[float, float]:
    """Bytes per second of writing with fsync, and of reading what is no longer in memory, of at most `most` bytes.

    Ends after about twice _SECONDS on a slow disk. Raises OSError where the folder takes no file.
    """
    chunk = os.urandom(_CHUNK)  # some file systems compress
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        start, size = time.perf_counter(), 0
        while size == 0 or (size < most and time.perf_counter() - start < _SECONDS):
            size += file.write(chunk[: max(1, min(_CHUNK, most - size))])
            os.fsync(file.fileno())
        written = size / (time.perf_counter() - start)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start, size = time.perf_counter(), 0
        while time.perf_counter() - start < _SECONDS and (piece := file.read(_CHUNK)):
            size += len(piece)
        return written, size / (time.perf_counter() - start)


def _file_system(folder: Path) -> str:
    """Its type, such as ext4 or nfs4, by the longest mount point above `folder`."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return "unknown"
    words = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    # of mounts at one place the last one counts, and `max` takes the first of equals
    return max(
        ((point, kind) for point, kind in reversed(words) if folder.resolve().is_relative_to(point)),
        key=lambda mount: len(mount[0]),
        default=("", "unknown"),
    )[1]


def caches() -> list[Finding]:
    """Folders that libraries write to: temporary files, data and models of the hub, code built at first use."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    folders = {
        "temporary": (os.environ.get("TMPDIR", "/tmp"), "TMPDIR", 1e9),
        "hub-cache": (home, "HF_HOME", 5e9),
        "build-cache": (
            os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions"),
            "TORCH_EXTENSIONS_DIR",
            1e9,
        ),
    }
    return [_cache(name, *facts) for name, facts in folders.items()]


def _cache(name: str, path: str, variable: str, needed: float) -> Finding:
    asked = Path(path).expanduser().absolute()
    folder = next(parent for parent in (asked, *asked.parents) if parent.exists())
    cure = f"set {variable} to a folder on a disk with room that this user may write to"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        return problem(name, f"{asked} takes no files: {error.strerror}", cure)
    free = shutil.disk_usage(folder).free
    seen = f"{asked}, {gigabytes(free)} free"
    if name == "build-cache" and os.statvfs(folder).f_flag & os.ST_NOEXEC:
        return warning(name, f"{asked} is mounted noexec: what is built there cannot be loaded", cure)
    return warning(name, seen, cure) if free < needed else ok(name, seen)
