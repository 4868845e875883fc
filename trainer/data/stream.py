"""The data set of a run: where its splits are, how they are read, and the samples of an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from trainer.data.files import FORMATS, FileSource
from trainer.data.hub import HubSource
from trainer.data.locate import expand, find_files, is_hub
from trainer.data.sources import Source, column, column_paths
from trainer.errors import ConfigError, DataError
from trainer.tasks import BadRecord, Encoded, Record, Task

_log = logging.getLogger(__name__)

_SPLITS = ("train", "validation", "test")
_ENCODE_RECORDS = 512
"""Records in one call of `task.encode` for an evaluation."""


@dataclass(frozen=True, slots=True)
class EvaluationSample:
    """A sample of an evaluation. `index`: its place among the usable records of the split."""

    index: int
    record: Record
    encoded: Encoded


class StreamData:
    """A data set in up to three splits: a file, glob, folder, URL or `corpora:NAME`, or a Hugging Face data set."""

    def __init__(
        self,
        path: str,
        name: str | None = None,
        format: str | None = None,
        train: str | None = "train",
        validation: str | None = "validation",
        test: str | None = "test",
        lanes: int = 48,
        block: int = 512,
        shuffle: bool = True,
        bucket: bool = True,
        trace: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        """Nothing is opened yet. Raises ConfigError for values that cannot be.

        name: configuration of a hub data set; format: jsonl, csv, tsv, text, parquet or hub (None: by suffix);
        train, validation, test: names of splits or file globs (None: there is none); lanes: logical streams, which the
        ranks must divide; block: records of a lane that are shuffled and bucketed together; bucket: steps of similar
        lengths; trace: keep the ids of all samples; max_bad_fraction: records that may be skipped as unusable.
        """
        formats = [*dict.fromkeys(FORMATS.values()), "hub"]
        problems = [
            f"data.{key}={value} must be at least 1."
            for key, value in (("lanes", lanes), ("block", block))
            if value < 1
        ]
        if format is not None and format not in formats:
            problems.append(
                f"data.format={format} is not known; use {', '.join(formats)}, or null to go by the suffix."
            )
        if not 0 <= max_bad_fraction <= 1:
            problems.append(f"data.max_bad_fraction={max_bad_fraction} must lie between 0 and 1.")
        if problems:
            raise ConfigError(*problems)
        self.path = path
        self.name = name
        self.format = format
        self.splits: dict[str, str | None] = dict(zip(_SPLITS, (train, validation, test), strict=True))
        self.lanes = lanes
        self.block = block
        self.shuffle = shuffle
        self.bucket = bucket
        self.trace = trace
        self.max_bad_fraction = max_bad_fraction
        self._opened: dict[str, tuple[Source, Record]] = {}

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
                    f"data.path={self.path}, split {split}: no column {name};"
                    f" there are {', '.join(column_paths(record))}."
                ) from None

    def records(self, split: str) -> Iterator[Record]:
        """One pass over a split, in the order of the files; rows that cannot be parsed are skipped and told."""
        source = self.source(split)
        num_bad = 0
        for index, name in enumerate(source.shards):
            for offset, record in enumerate(source.open(index, 0)):
                if not isinstance(record, BadRecord):
                    yield record
                    continue
                num_bad += 1
                if num_bad == 1:
                    _log.warning("split %s: skipped %s:%d: %s", split, name, offset, record.reason)
        if num_bad > 1:
            _log.warning("split %s: skipped %d records", split, num_bad)

    def evaluation_samples(
        self, split: str, task: Task, rank: int, world_size: int, max_samples: int | None
    ) -> list[EvaluationSample]:
        """Every `world_size`-th, from `rank` on, of the first `max_samples` usable records in file order."""
        samples: list[EvaluationSample] = []
        count = 0
        records = self.records(split)
        while part := list(islice(records, _ENCODE_RECORDS)):
            for record, encoded in zip(part, task.encode(part), strict=True):
                if isinstance(encoded, BadRecord):
                    continue
                if count == max_samples:
                    return samples
                if count % world_size == rank:
                    samples.append(EvaluationSample(count, record, encoded))
                count += 1
        return samples

    def _open(self, split: str) -> tuple[Source, Record]:
        """The source of a split and its first record."""
        if split not in self._opened:
            source = self._find(split)
            self._opened[split] = source, self._first_record(split, source)
        return self._opened[split]

    def _find(self, split: str) -> Source:
        if split not in self.splits:
            raise DataError(f"There is no split {split}; the splits are {', '.join(self.splits)}.")
        value = self.splits[split]
        if value is None:
            raise DataError(f"data.{split} is null: the data set data.path={self.path} has no such split.")
        path = expand(self.path)
        if self.format == "hub" or (self.format is None and is_hub(path)):
            return HubSource(path, self.name, value, min_shards=self.lanes)
        if self.name is not None:
            raise DataError(
                f"data.name={self.name} is for hub data sets, but data.path={self.path} is a file or folder."
            )
        return FileSource(*find_files(path, split, value, self.format), self.format)

    def _first_record(self, split: str, source: Source) -> Record:
        """The first record, which shows that a split is there and is what it is said to be."""
        for index, name in enumerate(source.shards):
            for record in source.open(index, 0):
                if isinstance(record, BadRecord):
                    raise DataError(
                        f"data.path={self.path}, split {split}: the first record of {name} cannot be read:"
                        f" {record.reason}. Is the file what its name or data.format says?"
                    )
                return record
        raise DataError(f"data.path={self.path}, split {split}: empty ({', '.join(source.shards[:5])}).")
