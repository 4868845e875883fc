"""The contract of a source, and columns of a record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from trainer.tasks import BadRecord, Record


class Source(Protocol):
    """Shards that can be opened at any record. Reading starts with `open`; making a source reads next to nothing."""

    @property
    def shards(self) -> Sequence[str]:
        """Names of the shards, in an order that is a function of the data alone."""

    def open(self, shard_index: int, offset: int) -> Iterator[Record | BadRecord]:
        """The records of a shard from record `offset` on (past the end: none), in file order.

        A row that cannot be parsed comes as a BadRecord and counts as a record. Raises DataError, naming shard and
        record, where the shard cannot be read further.
        """


def column(record: Record, path: str) -> Any:
    """The value of a column; `translation.en` goes into a nested mapping. Raises KeyError where it is missing."""
    if path in record:
        return record[path]
    value: Any = record
    for name in path.split("."):
        if not isinstance(value, Mapping):
            raise KeyError(path)
        value = value[name]
    return value


def column_paths(record: Record) -> list[str]:
    """Every dotted path that `column` takes, for error messages."""
    paths: list[str] = []
    for name, value in record.items():
        nested = column_paths(value) if isinstance(value, Mapping) else []
        paths += [f"{name}.{path}" for path in nested] or [str(name)]
    return paths
