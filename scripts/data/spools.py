"""From records to Parquet: what the processes of prepare.py do.

A unit (a shard of the source) becomes a spool: pieces of pickled records, compressed, each for one output file; then a
foot, which says what the unit was and where each output's pieces are; then the place of the foot, in 8 bytes. An output
file is merged from its pieces in all spools. Every file gets its name when it is complete.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from corpora import SPLITS, split_name

from trainer.data.dataset import Dataset
from trainer.data.sources import column
from trainer.data.stages import Removed
from trainer.data.stages.duplicates import ExactDuplicates
from trainer.errors import DataError
from trainer.tasks import BadRecord, Record

MIN_UNITS = 64  # not by the processes: the order must not depend on them
BATCH_RECORDS, BATCH_BYTES = 16384, 32 << 20
ROW_GROUP_BYTES = 64 << 20  # before compression
QUARANTINE = ("quarantine", 0)
NUM_TOLD = 5
FREE_TO_CHANGE = ("out", "processes", "max_bad_fraction", "report_only")  # what they are, the result is the same
NOT_FOR_PARQUET = (pa.ArrowException, OverflowError, UnicodeError)

Entry = dict[str, Any]
Output = tuple[str, int]  # a split and the number of a file, or QUARANTINE
Index = dict[Output, list[tuple[int, int]]]  # where the pieces are in a spool: (first byte, bytes)
Batch = list[tuple[int, Record | BadRecord, bytes]]  # (number in the shard, record, its pickle)


@dataclass(frozen=True)
class Plan:
    """What is to be done, the same in every process. `units`: (split, index, name) of the source's shards."""

    options: argparse.Namespace
    work: Path
    splits: dict[str, str]
    units: Sequence[tuple[str, int, str]] = ()

    @property
    def outputs(self) -> list[str]:
        """The splits that are written."""
        if list(self.splits) != ["train"]:
            return list(self.splits)
        return [split for split in SPLITS if split == "train" or vars(self.options)[f"{split}_fraction"]]

    def identity(self) -> Entry:
        """All that the result depends on."""
        arguments = {key: value for key, value in vars(self.options).items() if key not in FREE_TO_CHANGE}
        return {"arguments": arguments, "shards": [f"{split}/{name}" for split, _, name in self.units]}

    def dataset(self) -> Dataset:
        """The source. Nothing is opened yet."""
        splits: dict[str, Any] = {split: self.splits.get(split) for split in SPLITS}
        one = self.options
        return Dataset("data", one.source, one.name, one.format, **splits, min_shards=MIN_UNITS)

    def spool(self, number: int) -> Path:
        """Where a unit's records wait."""
        return self.work / f"{number}.spool"


@contextmanager
def written(path: Path, work: Path) -> Iterator[IO[bytes]]:
    """A file that is there as a whole or not at all; its half lies in `work`, on the same disk."""
    half = work / f"{path.name}.{os.getpid()}.half"
    try:
        with half.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def write_json(path: Path, value: Any, work: Path) -> None:
    """Write a value for people and programs."""
    with written(path, work) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")


def read_foot(file: IO[bytes]) -> tuple[Entry, Index]:
    """What a unit was, and where its pieces are."""
    file.seek(-8, os.SEEK_END)
    file.seek(int.from_bytes(file.read(8), "little"))
    foot: tuple[Entry, Index] = pickle.load(file)
    return foot


def read_spool(path: Path, output: Output) -> Iterator[tuple[Record, int]]:
    """The records for an output, each with its bytes."""
    with path.open("rb") as file:
        for begin, size in read_foot(file)[1].get(output, ()):
            file.seek(begin)
            piece = io.BytesIO(zstandard.decompress(file.read(size)))
            place = 0
            while place < len(piece.getbuffer()):
                record = pickle.load(piece)
                yield record, piece.tell() - place
                place = piece.tell()


def typed(batch: Batch, where: str) -> tuple[Batch, pa.Schema]:
    """A batch and the types of its columns; what Parquet could not hold even alone (half a surrogate ...) is bad.

    Raises DataError where two records do not fit each other.
    """
    try:
        return batch, schema_of([row for _, row, _ in batch if not isinstance(row, BadRecord)])
    except NOT_FOR_PARQUET:
        schemas: list[tuple[str, pa.Schema]] = []
    for place, (offset, row, _) in enumerate(batch):
        try:
            if not isinstance(row, BadRecord):
                schemas.append((f"{where}:{offset}", schema_of([row])))
        except NOT_FOR_PARQUET as error:
            batch[place] = offset, BadRecord(f"Parquet cannot hold it: {error}"), b""
    return batch, unify(schemas)


def schema_of(records: Sequence[Record]) -> pa.Schema:
    """The columns of records, in the order in which they come."""
    return pa.schema(list(pa.array(records, None if records else pa.struct([])).type))


def unify(schemas: Sequence[tuple[str, pa.Schema]]) -> pa.Schema:
    """One schema for all (shard, schema). Raises DataError, naming two shards, where none is."""
    fields: dict[str, tuple[str, pa.Field]] = {}
    for where, schema in schemas:
        for field in schema:
            first, known = fields.setdefault(field.name, (where, field))
            if known.equals(field):
                continue
            try:
                merged = pa.unify_schemas([pa.schema([known]), pa.schema([field])], promote_options="permissive")
            except pa.ArrowException:
                raise DataError(
                    f"Column {field.name} is {known.type} in {first}, but {field.type} in {where}; no column of Parquet"
                    " is both. Mend the source, or name the other columns with --columns."
                ) from None
            fields[field.name] = first, merged.field(0)
    return pa.schema([field for _, field in fields.values()])


def usable(row: Record | BadRecord, paths: Sequence[str]) -> Record | BadRecord:
    """A row with the columns `paths` alone, nested as they were (all where there are none), or why it is not."""
    if isinstance(row, BadRecord) or not paths:
        return row
    picked: dict[str, Any] = {}
    for path in paths:
        *folders, name = [path] if path in row else path.split(".")
        place = picked
        try:
            value = column(row, path)
        except KeyError:
            return BadRecord(f"no column {path}")
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return picked


def content(record: Record) -> str:
    """The same text for equal records."""
    return json.dumps(record, sort_keys=True, default=lambda v: v.tolist() if hasattr(v, "tolist") else repr(v))


class Worker:
    """What a process does: units into spools, spools into output files."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._options = plan, plan.options

    @cached_property
    def _dataset(self) -> Dataset:
        return self._plan.dataset()

    @cached_property
    def _duplicates(self) -> ExactDuplicates:
        stage = ExactDuplicates(self._options.drop_duplicates)
        stage.adopt(pickle.loads((self._plan.work / "duplicates").read_bytes()))
        return stage

    def look(self, number: int) -> Entry:
        """What `deal` would tell; nothing is kept."""
        with open(os.devnull, "wb") as file:
            return self._deal(number, dict.fromkeys(SPLITS, 1), file)

    def deal(self, number: int, shards: dict[str, int]) -> Entry:
        """Deal the records of a unit to so many files of each split, and tell what they were."""
        path = self._plan.spool(number)
        if path.exists():
            with path.open("rb") as file:
                return read_foot(file)[0]
        with written(path, self._plan.work) as file:
            return self._deal(number, shards, file)

    def _deal(self, number: int, shards: dict[str, int], file: IO[bytes]) -> Entry:
        split, _, name = self._plan.units[number]
        where = f"{split}/{name}"
        begun = hashlib.blake2b(f"{self._options.shuffle_seed}\n{where}\n".encode(), digest_size=8)
        counts: Counter[str] = Counter()
        first_bad: list[str] = []
        schema = pa.schema([])
        index: Index = defaultdict(list)
        for batch in self._batches(number, counts):
            batch, found = typed(batch, where)
            schema = unify([(where, schema), (where, found)])
            pieces: dict[Output, bytearray] = defaultdict(bytearray)
            for offset, row, pickled in batch:
                if isinstance(row, BadRecord):
                    counts["bad"] += 1
                    first_bad += [f"{where}:{offset}: {row.reason}"] if len(first_bad) < NUM_TOLD else []
                    line = {"id": f"{name}:{offset}", "split": split, "reason": row.reason}
                    pieces[QUARANTINE] += pickle.dumps(line)
                    continue
                place = begun.copy()
                place.update(b"%d" % offset)
                to = self._split_of(split, row)
                counts[to] += 1
                pieces[to, int.from_bytes(place.digest(), "little") % shards[to]] += pickled
            for output, records in pieces.items():
                piece = zstandard.compress(bytes(records), 1)
                index[output].append((file.tell(), len(piece)))
                file.write(piece)
        entry = {"where": where, "counts": counts, "first_bad": first_bad, "schema": schema}
        foot = file.tell()
        pickle.dump((entry, index), file)
        file.write(foot.to_bytes(8, "little"))
        return entry

    def _batches(self, number: int, counts: Counter[str]) -> Iterator[Batch]:
        """The records of a unit but for duplicates, which are counted."""
        split, index, name = self._plan.units[number]
        batch: Batch = []
        size = 0
        for offset, row in enumerate(self._dataset.source(split).open(index, 0)):
            record = usable(row, self._options.columns)
            if split == "train" and self._options.drop_duplicates and not isinstance(record, BadRecord):
                assert not isinstance(row, BadRecord)
                (judged,) = self._duplicates.apply([f"{name}:{offset}"], [row])
                if isinstance(judged, Removed):
                    counts["duplicates"] += 1
                    continue
            batch.append((offset, record, pickle.dumps(record)))
            size += len(batch[-1][2])
            if len(batch) == BATCH_RECORDS or size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        yield batch

    def _split_of(self, split: str, record: Record) -> str:
        if self._plan.outputs == list(self._plan.splits):
            return split
        return split_name(content(record), self._options.validation_fraction, self._options.test_fraction)

    def merge(self, split: str, number: int, count: int, schema: pa.Schema) -> Entry:
        """Write an output file, if it is not there, and tell what is in it."""
        path = self._options.out / f"{split}-{number:05d}-of-{count:05d}.parquet"
        if not path.exists():
            with written(path, self._plan.work) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
                for rows in self._row_groups((split, number)):
                    columns = [pa.array([row.get(field.name) for row in rows], field.type) for field in schema]
                    writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        records = pq.read_metadata(path).num_rows
        return {"file": path.name, "records": records, "bytes": path.stat().st_size, "sha256": digest}

    def _row_groups(self, output: Output) -> Iterator[list[Record]]:
        rows: list[Record] = []
        total = 0
        for number in range(len(self._plan.units)):
            for record, size in read_spool(self._plan.spool(number), output):
                rows.append(record)
                total += size
                if len(rows) == self._options.row_group or total >= ROW_GROUP_BYTES:
                    yield rows
                    rows, total = [], 0
        if rows:
            yield rows
