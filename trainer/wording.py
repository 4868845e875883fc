"""Words for people: dotted keys of nested settings, the nearest known name, and types in a user's language."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of nested mappings; an empty mapping is a leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence's end: `; did you mean X?` with the nearest dotted key, else the nearest last name; or a full stop."""
    keys = sorted(known)
    near = difflib.get_close_matches(word, keys, n=1, cutoff=0.7)
    if not near:
        by_name = {key.rpartition(".")[2]: key for key in keys}
        near = [by_name[name] for name in difflib.get_close_matches(word.rpartition(".")[2], by_name, n=1, cutoff=0.7)]
    return f"; did you mean {near[0]}?" if near else "."


def describe(hint: Any) -> str:
    """A type in a user's words: `a whole number or null`."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(hint.__members__)
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "null"}
    if get_origin(hint) is Mapping:
        return "a mapping"
    if hint in names:
        return names[hint]
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        simple = [member for member in get_args(hint) if member in names or get_origin(member) is not None]
        return " or ".join(map(describe, simple or get_args(hint)))
    if get_origin(hint) in (list, tuple, Sequence):
        return f"a list with {describe(get_args(hint)[0])} in each place"
    return getattr(hint, "__name__", str(hint))


def format_seconds(seconds: float) -> str:
    """4:05 or 1:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def short_number(value: float | str) -> str:
    """Four significant digits, and no exponent for what fits a line without; a text as it is."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def amount(num_bytes: float) -> str:
    """A number of bytes in a user's words: `1.50 GiB`, `12.0 MiB`, `3 KiB`."""
    for unit, size, digits in (("TiB", 2**40, 2), ("GiB", 2**30, 2), ("MiB", 2**20, 1)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.{digits}f} {unit}"
    return f"{num_bytes / 1024:.0f} KiB"
