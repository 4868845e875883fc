"""DeepSpeed's hostfile, and the choice of hosts and slots from it: strictly, with every mistake by its line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from trainer.errors import ConfigError
from trainer.wording import did_you_mean


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots (ranks at most) by host, in the order of the file; lines are `HOST slots=N`, `#` begins a comment. Raises
    ConfigError with every wrong line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"launcher.hostfile={path} cannot be read: {error}.") from error
    slots: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([\w.:@-]+)\s+slots\s*=\s*(\S+)", text)
        if match is None:
            problems.append(f"{path}:{number}: {text!r} is not `HOST slots=N`.")
        elif not match[2].isdecimal() or int(match[2]) < 1:
            problems.append(f"{path}:{number}: slots={match[2]} must be a whole number of at least 1.")
        elif match[1] in slots:
            problems.append(f"{path}:{number}: {match[1]} is there twice; give each host one line with all its slots.")
        else:
            slots[match[1]] = int(match[2])
    if not slots and not problems:
        problems.append(f"{path} names no host; write a line `HOST slots=N` for each.")
    if problems:
        raise ConfigError(*problems)
    return slots


def choose(slots: Mapping[str, int], include: str | None, exclude: str | None) -> dict[str, list[int]]:
    """The numbers of the slots to use by host: all, or those of `include`, or all but those of `exclude`, written as
    DeepSpeed does: HOST[:SLOT,SLOT...][@HOST...]. Raises ConfigError."""
    chosen = {host: list(range(count)) for host, count in slots.items()}
    if include is not None and exclude is not None:
        raise ConfigError("launcher.include and launcher.exclude exclude each other; give one of them.")
    if include is not None:
        named = _named(include, "include", chosen)
        chosen = {host: named[host] for host in chosen if host in named}
    if exclude is not None:
        named = _named(exclude, "exclude", chosen)
        chosen = {host: [slot for slot in every if slot not in named.get(host, ())] for host, every in chosen.items()}
    chosen = {host: every for host, every in chosen.items() if every}
    if not chosen:
        raise ConfigError(f"launcher.exclude={exclude} leaves no slot of the hostfile.")
    return chosen


def _named(text: str, key: str, known: Mapping[str, list[int]]) -> dict[str, list[int]]:
    named: dict[str, list[int]] = {}
    problems = []
    for part in text.split("@"):
        host, colon, numbers = part.partition(":")
        if host not in known:
            problems.append(f"launcher.{key}={text}: the hostfile has no {host!r}{did_you_mean(host, known)}")
            continue
        wanted = numbers.split(",") if colon else [str(slot) for slot in known[host]]
        wrong = [number for number in wanted if not number.isdecimal() or int(number) not in known[host]]
        if wrong:
            last = known[host][-1]
            problems.append(f"launcher.{key}={text}: {host} has the slots 0 to {last}, not {', '.join(wrong)}.")
        else:
            named[host] = sorted({*named.get(host, []), *map(int, wanted)})
    if problems:
        raise ConfigError(*problems)
    return named
