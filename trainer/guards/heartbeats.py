"""Signs of life: one small file a rank, and what the files of all ranks say about who is late."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.host import group_oom_kills, read_or_empty

_ORDER = ("start-up", "data", "agree", "forward", "reduce", "optimizer", "commit", "log", "evaluate", "save")
"""Sections in the order in which a step passes through them; backward takes turns with forward."""

_NAMED = 8
"""The most ranks that a message names."""

_WITNESSES = 16
"""The most ranks, about, that look at the signs of life of all."""

_READERS = 16
"""Threads that read them; most of their time is the file system's."""

ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a rank does. step: the one it works on, None before the first; since: when it began on the section, beat:
    when it wrote this (Unix times); resident, available, total: bytes of the process and of its host."""

    rank: int
    host: str
    pid: int
    step: int | None
    section: str
    since: float
    beat: float
    resident: int = 0
    available: int = 0
    total: int = 0

    @property
    def who(self) -> str:
        """The rank, and the process to look at."""
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def where(self) -> str:
        """The section and its step."""
        return self.section if self.step is None else f"{self.section} of step {self.step}"

    @property
    def place(self) -> tuple[int, int]:
        """How far the rank has come; sorts."""
        section = "forward" if self.section == "backward" else self.section
        return self.step or 0, _ORDER.index(section) if section in _ORDER else len(_ORDER)

    @property
    def ended(self) -> bool:
        """Whether the rank has left the run by itself; `section` then says how."""
        return self.section.startswith(ENDED)

    def write(self, folder: Path) -> None:
        """Replace the rank's file in one move."""
        path = _path(folder, self.rank)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        partial.replace(path)


def read_heartbeats(folder: Path, world_size: int, after: float) -> dict[int, Heartbeat]:
    """The last sign of life of each rank, by rank; none of before `after`, for those are of an earlier start."""

    def read_one(rank: int) -> Heartbeat | None:
        with suppress(OSError, ValueError, TypeError):
            return Heartbeat(**json.loads(_path(folder, rank).read_text(encoding="utf-8")))
        return None

    with ThreadPoolExecutor(_READERS) as threads:
        found = list(threads.map(read_one, range(world_size)))
    return {beat.rank: beat for beat in found if beat is not None and beat.beat >= after}


def witnesses(world_size: int) -> range:
    """The ranks that find out who is late or has gone: all of a small job, some on many hosts of a large one, for each
    has to read a file of every rank."""
    return range(0, world_size, max(1, world_size // _WITNESSES))


def beat_seconds(world_size: int) -> float:
    """Between two signs of life of a rank: rarer in a large job, whose files are all of one file system."""
    return max(1.0, min(5.0, world_size / 1000))


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.json"


def who_is_late(beats: Mapping[int, Heartbeat], world_size: int, now: float, silence: float) -> str:
    """In words: which ranks of a hanging job keep the others waiting, where, and for how long.

    silence: seconds without a sign of life after which a process counts as stopped.
    """
    if not beats:
        return "no rank has given a sign of life; the run directory is made when data and model have been checked"
    lost = [beat for beat in beats.values() if beat.ended or now - beat.beat > silence]
    missing = [rank for rank in range(world_size) if rank not in beats]
    alive = [beat for beat in beats.values() if beat not in lost]
    if lost or missing:
        return f"{_listed([*_gone(lost, now), *_unheard(missing)])}{_waiting(alive)}"
    last = min(beat.place for beat in alive)
    late, waiting = [beat for beat in alive if beat.place == last], [beat for beat in alive if beat.place != last]
    if waiting or world_size == 1:
        told = (f"{beat.who} has been in {beat.where} for {_duration(now - beat.since)}" for beat in late)
        return f"{_listed(told)}{_waiting(waiting)}"
    seconds = now - max(beat.since for beat in alive)
    return (
        f"all {world_size} ranks have been in {late[0].where} for {_duration(seconds)} and wait for each other: one"
        " does not come to their common call, or the network between them is down; compare their stacks"
    )


def who_has_gone(
    before: Mapping[int, Heartbeat], beats: Mapping[int, Heartbeat], world_size: int
) -> list[Heartbeat | int]:
    """The ranks that ended by themselves, and not because they lost another; and those without a new sign of life since
    `before` (the bare number, where there was none at all)."""
    found: list[Heartbeat | int] = []
    for rank in range(world_size):
        beat = beats.get(rank)
        if beat is None:
            found.append(rank)
        elif (beat.ended and "PeerError" not in beat.section) or (
            not beat.ended and rank in before and before[rank].beat == beat.beat
        ):
            found.append(beat)
    return found


def explain_gone(gone: Iterable[Heartbeat | int], now: float) -> str:
    """In words: which processes have gone, where they were, and how much memory was left."""
    known = [one for one in gone if isinstance(one, Heartbeat)]
    return _listed([*_gone(known, now), *_unheard([one for one in gone if isinstance(one, int)])])


def _gone(lost: Iterable[Heartbeat], now: float) -> Iterable[str]:
    for beat in lost:
        if beat.ended:
            yield f"{beat.who} has {beat.section}"
        else:
            yield (
                f"{beat.who} has given no sign of life for {_duration(now - beat.beat)}, since {beat.where}: the"
                " process was stopped or killed, or its host or its file system is down"
            )


def _unheard(ranks: Iterable[int]) -> Iterable[str]:
    return (f"rank {rank} has given no sign of life since the job began" for rank in ranks)


def _waiting(beats: Iterable[Heartbeat]) -> str:
    counts = Counter(beat.where for beat in sorted(beats, key=lambda beat: beat.place))
    if not counts:
        return ""
    total = sum(counts.values())
    verb = "1 rank waits" if total == 1 else f"{total} ranks wait"
    shown = [where if len(counts) == 1 else f"{where} ({count})" for where, count in counts.items()]
    return f", while {verb} for it in {_listed(shown, ', ')}"


def _listed(parts: Iterable[str], separator: str = "; ") -> str:
    every = list(parts)
    more = f"{separator}and {len(every) - _NAMED} more" if len(every) > _NAMED else ""
    return separator.join(every[:_NAMED]) + more


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def memory() -> tuple[int, int, int]:
    """Bytes: resident in this process, available on this host, and all that the host has; zeros where none can say."""
    resident, available, total = 0, 0, 0
    with suppress(OSError, ValueError, KeyError):
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available, total = (int(facts[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    return resident, available, total


def oom_kills() -> int:
    """Processes that the kernel has killed for a lack of memory so far: in this process's control group, or, where that
    cannot be read, on this host."""
    if (killed := group_oom_kills()) is not None:
        return killed
    counts = dict(line.split() for line in read_or_empty(Path("/proc/vmstat")).splitlines())
    return int(counts.get("oom_kill", 0))
