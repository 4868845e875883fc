"""A watchdog against hangs: a rank that stays too long where it is ends its process and says who is late.

There is one watchdog a process, as there is one process group: `watching` starts it, and `trainer.sections` tells it
what this rank does. A main thread that waits in a collective cannot be interrupted, so the process ends by `os._exit`;
the launcher then ends the other ranks and starts the job again.
"""

from __future__ import annotations

import faulthandler
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer import distributed, sections
from trainer.config import GuardConfig
from trainer.errors import PeerError
from trainer.guards.heartbeats import (
    ENDED,
    Heartbeat,
    beat_seconds,
    explain_gone,
    memory,
    oom_kills,
    read_heartbeats,
    who_has_gone,
    who_is_late,
    witnesses,
)
from trainer.run_directory import RunDirectory

LONG = {"evaluate": 4, "commit": 4, "save": 4, "rollback": 4}
"""Sections that may take a multiple of guard.step_seconds."""

_LOOK_SECONDS = 0.5
"""Between two looks at how long this rank has been where it is."""

_FROZEN_SECONDS = 10.0
"""Where the watching thread itself did not run for so long, the whole process was stopped, and nobody is to blame."""

_SILENCE_SECONDS = (4.0, 60.0)
"""Least and most time without a sign of life that makes a process a stopped one; between them half a time-out."""

_REPORT_SECONDS = 20.0
"""For the last words; a file system that hangs must not keep a process that hangs."""

_LAST_WORDS_SECONDS = 6.0
"""For what others want to tell of the end; part of the above."""

_WITNESS_SECONDS = 8.0
"""That a rank which is no witness gives those who are to speak."""

_BROKEN = re.compile(
    r"(closed|reset) by peer|Broken pipe|Timed out waiting|Socket Timeout|Socket closed|remote process exited"
    r"|Connection refused|NCCL (communicator was aborted|error)|unhandled system error",
    re.IGNORECASE,
)
"""What the back ends say where another rank is no more, or does not come."""


@dataclass
class _Watched:
    """The run that this process works on."""

    guard: GuardConfig = field(default_factory=GuardConfig)
    rank: int = 0
    world_size: int = 1
    started: float = 0.0  # Unix time
    oom_kills: int = 0
    launcher: int | None = None  # its process id
    mark: tuple[str, int | None, float] = ("start-up", None, 0.0)  # section, step, since when (monotonic)
    first_step: int | None = None
    directory: RunDirectory | None = None
    over: threading.Event = field(default_factory=threading.Event)
    last_words: Callable[[], None] | None = None

    def hear(self, section: str, step: int | None) -> None:
        """A section begins."""
        self.mark = section, step, time.monotonic()
        if self.first_step is None:
            self.first_step = step


_watched = _Watched()


def progress() -> None:
    """The section goes on and does not hang."""
    name, step, _ = _watched.mark
    _watched.mark = name, step, time.monotonic()


def attach(directory: RunDirectory) -> None:
    """From now on heartbeats go to this run, once its folder is there. Not before a run of others is ruled out."""
    _watched.directory = directory


def last_words(say: Callable[[], None]) -> None:
    """What to do before this process ends because of a hang, if it can be done soon."""
    _watched.last_words = say


def collective_seconds(guard: GuardConfig) -> float:
    """A time-out of the process group that lets the watchdog speak first."""
    return max(1800.0, guard.start_seconds or 0.0, max(LONG.values()) * (guard.step_seconds or 0.0)) + 60.0


@contextmanager
def watching(guard: GuardConfig) -> Iterator[None]:
    """Watch over this process until the run is over."""
    global _watched
    _watched = watched = _Watched(
        guard=guard,
        rank=int(os.environ.get("RANK", "0")),
        world_size=distributed.launched_ranks(),
        started=time.time(),
        oom_kills=oom_kills(),
        launcher=os.getppid() if "RANK" in os.environ else None,
        mark=("start-up", None, time.monotonic()),
    )
    threads = [threading.Thread(target=target, args=(watched,), daemon=True) for target in (_beat, _watch)]
    for thread in threads:
        thread.start()
    ending = ENDED
    try:
        with sections.told_to(watched.hear):
            yield
    except BaseException as error:
        ending = f"{ENDED}: {type(error).__name__}: {str(error)[:500]}"
        raise
    finally:
        watched.over.set()
        for thread in threads:
            thread.join(timeout=2.0)
        _write_beat(watched, ending)


def _beat(watched: _Watched) -> None:
    """A thread of its own: the file system may hang, and must not hold up the one that watches."""
    while not watched.over.wait(beat_seconds(watched.world_size)):
        _write_beat(watched, watched.mark[0])


def _write_beat(watched: _Watched, name: str) -> None:
    _, step, since = watched.mark
    if watched.directory is not None and watched.directory.path.is_dir():
        now = time.time()
        who = watched.rank, socket.gethostname(), os.getpid()
        with suppress(OSError):  # a full disk is told by others
            Heartbeat(*who, step, name, now - time.monotonic() + since, now, *memory()).write(
                watched.directory.heartbeats
            )


def _limit(watched: _Watched) -> tuple[str, float | None]:
    """The time-out of the present section, and its key; the first step brings data and compilers up, so it starts."""
    name, step, _ = watched.mark
    if step in (None, watched.first_step) and name not in LONG:
        return "guard.start_seconds", watched.guard.start_seconds
    seconds = watched.guard.step_seconds
    return "guard.step_seconds", None if seconds is None else seconds * LONG.get(name, 1)


def _watch(watched: _Watched) -> None:
    """End the process once a section takes too long, or nobody is there any more to end it."""
    last = resumed = time.monotonic()
    while not watched.over.wait(_LOOK_SECONDS):
        if watched.launcher not in (None, os.getppid()):
            _within(_REPORT_SECONDS, _report_orphan, watched)
            os._exit(PeerError.exit_code)
        now = time.monotonic()
        if now - last > _FROZEN_SECONDS:
            resumed = now
        last = now
        key, limit = _limit(watched)
        if limit is not None and now - max(watched.mark[2], resumed) > limit:
            _within(_REPORT_SECONDS, _report, watched, key, limit) or _within(1.0, faulthandler.dump_traceback)
            os._exit(PeerError.exit_code)


def _within(seconds: float, action: Callable[..., Any], *arguments: Any) -> bool:
    """Whether `action` came to its end in that time; it goes on where it did not."""
    thread = threading.Thread(target=action, args=arguments, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _report(watched: _Watched, key: str, limit: float) -> None:
    """Leave the stacks, and say who is late: on standard error and, if no other rank has, in status.json."""
    stacks = _dump_stacks(watched)
    told = _told(watched)
    deadline = time.monotonic() + _WITNESS_SECONDS
    while told is None and watched.rank not in witnesses(watched.world_size) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
        told = _told(watched)
    if told is None:
        beats = _read(watched)
        least, most = max(_SILENCE_SECONDS[0], 4 * beat_seconds(watched.world_size)), _SILENCE_SECONDS[1]
        late = who_is_late(beats, watched.world_size, time.time(), max(least, min(most, limit / 2)))
        name, step, _ = watched.mark
        text = (
            f"hang: {late}. Noticed by rank {watched.rank} in {name}{'' if step is None else f' of step {step}'} after"
            f" {limit:g} s ({key}); stacks: {stacks}. Start it again, and it goes on from its newest checkpoint."
        )
    else:
        text = f"this rank hangs too; stacks: {stacks}"
    prefix = f"[rank {watched.rank}] " if watched.rank else ""
    print(f"{prefix}error: {text}", file=sys.stderr, flush=True)
    if told is None and watched.directory is not None and watched.directory.path.is_dir():
        watched.directory.conclude("failed", text, PeerError.exit_code)
    if watched.last_words is not None:
        _within(_LAST_WORDS_SECONDS, watched.last_words)


def _report_orphan(watched: _Watched) -> None:
    """Say that the launcher is no more. A rank that went on would write into a run that somebody starts again."""
    text = (
        f"the launcher (pid {watched.launcher}) has gone, which was to end this rank if another fails. Start it again,"
        " and it goes on from its newest checkpoint."
    )
    if watched.rank == 0 and watched.directory is not None and watched.directory.path.is_dir():
        watched.directory.conclude("failed", text, PeerError.exit_code)
    print(f"{f'[rank {watched.rank}] ' if watched.rank else ''}error: {text}", file=sys.stderr, flush=True)


def _dump_stacks(watched: _Watched) -> Path | str:
    """The stacks of all threads of this process, appended to its file; on standard error where there is none."""
    if watched.directory is not None:
        path = watched.directory.stacks(watched.rank)
        with suppress(OSError), path.open("a", encoding="utf-8") as file:
            file.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S %z')} rank {watched.rank} pid {os.getpid()}\n")
            file.flush()
            faulthandler.dump_traceback(file)
            return path
    faulthandler.dump_traceback(sys.stderr)
    return "standard error"


def _told(watched: _Watched) -> str | None:
    """What another rank has said of a hang of this run, since this process began."""
    if watched.directory is not None:
        with suppress(OSError, ValueError, KeyError):
            status, path = watched.directory.read_status(), watched.directory.path / "status.json"
            if status["exit_code"] == PeerError.exit_code and path.stat().st_mtime > watched.started:
                return str(status["reason"])
    return None


def _read(watched: _Watched) -> dict[int, Heartbeat]:
    if watched.directory is None:
        return {}
    return read_heartbeats(watched.directory.heartbeats, watched.world_size, watched.started)


@contextmanager
def explaining_lost_peers() -> Iterator[None]:
    """Turn what a back end raises because of another rank into a PeerError that names the rank."""
    try:
        yield
    except RuntimeError as error:
        if _watched.world_size == 1 or not _BROKEN.search(str(error)):
            raise
        raise explain_lost_peer(_watched, str(error).strip().split(". This is")[0]) from error


def explain_lost_peer(watched: _Watched, error: str) -> PeerError:
    """Who has gone, by the heartbeats that do not come any more; or the hang that another rank has told."""
    speakers = witnesses(watched.world_size)
    if watched.rank not in speakers:  # and does not end before they have looked: a launcher may then end them
        time.sleep(3 * beat_seconds(watched.world_size) + _WITNESS_SECONDS)
        return PeerError(_told(watched) or f"lost a peer ({error})", speaks=False)
    before = _read(watched)
    time.sleep(3 * beat_seconds(watched.world_size))
    told, beats, now = _told(watched), _read(watched), time.time()
    if told is not None:
        return PeerError(told, speaks=False)
    if watched.rank not in beats:
        text = f"another rank has gone before there were heartbeats; it may have told why ({error})"
        return PeerError(text, speaks=watched.rank <= 1)  # one of the two is there
    gone = [one for one in who_has_gone(before, beats, watched.world_size) if one != beats[watched.rank]]
    if not gone:
        late = who_is_late(beats, watched.world_size, now, _SILENCE_SECONDS[1])
        text = f"the connection to another rank broke, though all ranks are alive: {late} ({error})"
        return PeerError(text, speaks=watched.rank == 0)
    text = f"lost a peer: {explain_gone(gone, now)}{_out_of_memory(watched, gone)} ({error})"
    numbers = {one if isinstance(one, int) else one.rank for one in gone}
    speaks = watched.rank == min(set(speakers) - numbers)
    if speaks and watched.rank != 0 and watched.directory is not None:  # rank 0 concludes by itself
        watched.directory.conclude("failed", text, PeerError.exit_code)
    return PeerError(text, speaks)


def _out_of_memory(watched: _Watched, gone: list[Heartbeat | int]) -> str:
    """That it was probably the kernel's out-of-memory killer, with the figures; empty where nothing speaks for it."""
    host, kills = socket.gethostname(), oom_kills() - watched.oom_kills
    for one in gone:
        if isinstance(one, Heartbeat) and not one.ended:
            scarce = one.total > 0 and one.available < 0.05 * one.total
            killed = kills > 0 and one.host == host
            if scarce or killed:
                resident, available, total = (size / 2**30 for size in (one.resident, one.available, one.total))
                counted = f"; the kernel has counted {kills} kill(s) for a lack of memory" if killed else ""
                return (
                    f". It was probably the out-of-memory killer: at its last sign of life rank {one.rank} held"
                    f" {resident:.1f} GiB, and {available:.1f} of {total:.1f} GiB of {one.host} were left{counted}"
                )
    return ""
