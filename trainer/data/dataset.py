"""One data set: where its splits are, how they are read, and whether it is what it is said to be."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.build import build
from trainer.data.files import FORMATS, FileSource
from trainer.data.hub import HubSource
from trainer.data.locate import expand, find_files, is_hub
from trainer.data.remote import Retries
from trainer.data.sources import Source, column, column_paths
from trainer.errors import ConfigError, DataError, redacted
from trainer.tasks import BadRecord, Record

_log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")

_WITHOUT = {
    "validation": "To go without, set eval.every=0 and eval.final_split=test or none.",
    "test": "To go without, set eval.final_split=validation or none.",
}
"""What does not ask for a split."""


class Dataset:
    """A data set in up to three splits: a file, glob, folder, URL or `corpora:NAME`, or a Hugging Face data set."""

    def __init__(
        self,
        key: str,
        path: str | None,
        name: str | None = None,
        format: str | None = None,
        train: str | None = "train",
        validation: str | None = "validation",
        test: str | None = "test",
        min_shards: int = 1,
        retries: Retries | None = None,
        part: Mapping[str, Any] | None = None,
    ) -> None:
        """Nothing is opened yet. Raises ConfigError for a format that is not known, and where not exactly one of `path`
        and `part` is given.

        key: its place in the configuration, for messages; name: configuration of a hub data set; format: one of
        FORMATS or hub (None: by suffix); train, validation, test: names of splits or file globs (None: there is none);
        min_shards: fewer shards are cut into more, where their format can be cut; retries: how faults of servers are
        waited out, None = as `set_retries` says; part: instead of path, a class of `Source` and its arguments, to which
        the split's name is added.
        """
        if (path is None) == (part is None):
            raise ConfigError(f"{key}.path={path} and {key}.source={part}: give one of the two.")
        formats = [*dict.fromkeys(FORMATS.values()), "hub"]
        if format is not None and format not in formats:
            raise ConfigError(
                f"{key}.format={format} is not known; use {', '.join(formats)}, or null to go by the suffix."
            )
        self.path = path or str(part)
        self._part = part
        self._told = f"{key}.path={redacted(self.path)}" if part is None else f"{key}.source={part.get('_target_')}"
        self._key = key
        self._name = name
        self._format = format
        self._splits = dict(zip(SPLITS, (train, validation, test), strict=True))
        self._min_shards = min_shards
        self._retries = retries
        self._opened: dict[str, tuple[Source, Record]] = {}

    def has(self, split: str) -> bool:
        """Whether the configuration gives it such a split."""
        return self._splits.get(split) is not None

    def source(self, split: str) -> Source:
        """The source of a split. Raises DataError where it is missing, empty or not what its name says."""
        return self._open(split)[0]

    def check(self, split: str, columns: Sequence[str]) -> None:
        """Raise DataError unless the first record of the split has all (dotted) `columns`."""
        _, record = self._open(split)
        for name in columns:
            try:
                column(record, name)
            except KeyError:
                raise DataError(
                    f"{self._told}, split {split}: no column {name}; there are {', '.join(column_paths(record))}."
                ) from None

    def records(self, split: str) -> Iterator[tuple[str, Record]]:
        """One pass over a split with ids ("shard:record"), in the order of the files; rows that cannot be parsed are
        skipped and told."""
        source = self.source(split)
        num_bad = 0
        for index, name in enumerate(source.shards):
            for offset, record in enumerate(source.open(index, 0)):
                if not isinstance(record, BadRecord):
                    yield f"{name}:{offset}", record
                    continue
                num_bad += 1
                if num_bad == 1:
                    _log.warning("split %s: skipped %s:%d: %s", split, name, offset, record.reason)
        if num_bad > 1:
            _log.warning("split %s: skipped %d records", split, num_bad)

    def _open(self, split: str) -> tuple[Source, Record]:
        """The source of a split and its first record."""
        if split not in self._opened:
            source = self._find(split)
            self._opened[split] = source, self._first_record(split, source)
        return self._opened[split]

    def _find(self, split: str) -> Source:
        if split not in self._splits:
            raise DataError(f"There is no split {split}; the splits are {', '.join(self._splits)}.")
        value = self._splits[split]
        if value is None:
            without = f" {_WITHOUT[split]}" if split in _WITHOUT else ""
            raise DataError(f"{self._key}.{split} is null: the data set {self._told} has no such split.{without}")
        if self._part is not None:
            source: Source = build(self._part, f"{self._key}.source", split=value)
            return source
        path = expand(self.path)
        if self._format == "hub" or (self._format is None and is_hub(path)):
            return HubSource(path, self._name, value, self._min_shards)
        if self._name is not None:
            raise DataError(
                f"{self._key}.name={self._name} is for hub data sets, but {self._told} is a file or folder."
            )
        paths, names = find_files(path, split, value, self._format)
        return FileSource(paths, names, self._format, self._min_shards if split == "train" else 1, self._retries)

    def _first_record(self, split: str, source: Source) -> Record:
        """The first record, which shows that a split is there and is what it is said to be."""
        for index, name in enumerate(source.shards):
            for record in source.open(index, 0):
                if isinstance(record, BadRecord):
                    raise DataError(
                        f"{self._told}, split {split}: the first record of {name} cannot be read:"
                        f" {record.reason}. Is the file what its name or {self._key}.format says?"
                    )
                return record
        raise DataError(f"{self._told}, split {split}: empty ({', '.join(source.shards[:5])}).")
