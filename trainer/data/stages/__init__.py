"""Stages: what may happen to a record between reading and encoding it. Optional, and counted by name.

The order of the stream is a function of the data, the seed and the epoch alone, so a stage has no memory while
streaming: what becomes of a record depends on that record, its id and the options, never on what came before it or
with it. A stage that must compare records (`NeedsPass`) surveys the whole train split once, before training; from then
on its finding is a constant.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from trainer.data.sources import column
from trainer.errors import ConfigError, SetupError
from trainer.tasks import Record


@dataclass(frozen=True, slots=True)
class Removed:
    """A record that is left out, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Changed:
    """A changed copy of a record. `count`: places that were changed, at least 1."""

    record: Record
    count: int


class Stage(Protocol):
    """One step between reading and encoding. A column that is missing or no text is the task's business, not its."""

    name: str
    """In snake_case: `data/removed/<name>`, `data/changed/<name>`, and in quarantine.jsonl."""

    def apply(self, ids: Sequence[str], records: Sequence[Record]) -> list[Record | Changed | Removed]:
        """One result per record, in order: the record itself, a changed copy, or why it is removed.

        `ids`: "shard:offset" of each record. The records are not modified.
        """


@runtime_checkable
class NeedsPass(Stage, Protocol):
    """A stage that sees the whole train split once. It is not for other splits: their ids mean other records."""

    def survey(self, records: Iterable[tuple[str, Record]]) -> Any:
        """What is found in all (id, record), in the order of the files; picklable, and adopted by every rank."""

    def adopt(self, finding: Any) -> None:
        """Work by what a survey has found; before it, `apply` must not be called."""


def text_of(record: Record, path: str) -> str | None:
    """The text of a (dotted) column; None where the column is missing or no text."""
    try:
        value = column(record, path)
    except KeyError:
        return None
    return value if isinstance(value, str) else None


def with_column(record: Record, path: str, value: Any) -> Record:
    """A copy of `record` in which the (dotted) column `path`, which it has, is `value`; the rest is shared."""
    return _replaced(record, [path] if path in record else path.split("."), value)


def _replaced(record: Record, names: Sequence[str], value: Any) -> dict[str, Any]:
    head, *rest = names
    return {**record, head: _replaced(record[head], rest, value) if rest else value}


def check_columns(stage: str, columns: Iterable[str]) -> None:
    """Raise ConfigError unless a stage has a column to work on, and names none of them twice."""
    names = list(columns)
    if not names:
        raise ConfigError(f"{stage}: columns={names} names no column; name one at least, or leave the stage out.")
    if len(set(names)) < len(names):
        raise ConfigError(f"{stage}: columns={names} names a column twice; name it once.")


def require(module: str, package: str) -> Any:
    """Import a library of the extra `filters`. Raises SetupError with the cure where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SetupError(f"This stage needs the package {package}: pip install shardwright[filters].") from error
