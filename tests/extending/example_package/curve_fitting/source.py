"""A data source: a table of an SQLite database, a shard for each `shard_rows` rows."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.errors import DataError
from trainer.tasks import BadRecord, Record


class SqliteSource:
    """The rows of the table that is named like the split, in the order of their row ids."""

    def __init__(self, path: str, split: str, shard_rows: int = 100) -> None:
        if not Path(path).is_file():
            raise DataError(f"data.source.path={path}: there is no such file.")
        self._path, self._table, self._shard_rows = path, split, shard_rows
        with sqlite3.connect(path) as database:
            (rows,) = database.execute(f'SELECT count(*) FROM "{split}"').fetchone()
        self._shards = [f"{split}:{first}" for first in range(0, rows, shard_rows)]

    @property
    def shards(self) -> Sequence[str]:
        """Names of the shards, a function of the data alone."""
        return self._shards

    def open(self, shard_index: int, offset: int) -> Iterator[Record | BadRecord]:
        """The records of a shard from `offset` on."""
        first = shard_index * self._shard_rows
        with sqlite3.connect(self._path) as database:
            database.row_factory = sqlite3.Row
            window = (max(0, self._shard_rows - offset), first + offset)
            rows = database.execute(f'SELECT * FROM "{self._table}" ORDER BY rowid LIMIT ? OFFSET ?', window).fetchall()
        yield from map(dict, rows)
