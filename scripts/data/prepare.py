"""Make any source that `data.path` takes into a folder of sharded Parquet that trains well with this project.

    python scripts/data/prepare.py SOURCE OUT [--shards 96] [--columns text] [--drop-duplicates text] [--processes K]

SOURCE: a file, glob, folder, URL, corpora:NAME or hub name, in any format of `trainer.data`. OUT gets
train-00000-of-00096.parquet ... (zstd, small row groups: a rank reads its own shards alone, a resume skips row groups),
quarantine.jsonl (records that cannot be used, and why) and, last, manifest.json (what came of what, with SHA-256).
Splits are the source's own; `--splits train=NAME_OR_GLOB,test=...` picks others. Where there is train alone,
--validation-fraction and --test-fraction cut them off by a hash of the record, so equal records are never in two.
Held-out splits get one file each, unless --records-per-shard (a pass more, to count) says how many.

How: every shard of the source (a large file is cut, unless compressed) is a *unit*. Each is read as a stream, and a
hash of (seed, shard, record number) deals its records to the output files, in a spool: one file in OUT/.parts, with
compressed pieces by output. Then each output file is put together from its pieces, unit after unit. So its order is a
function of source, options and seed; processes only share the work. All units have been seen by then, so all files have
the same columns: a key that only some records have is null in the others. Spools need the disk space once more.

Killed at any moment, the same command goes on: a spool or output file gets its name when it is complete, so the names
are the journal. What is missing is made anew, and comes out the same to the byte.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from corpora import SPLITS, split_name

import trainer
from trainer.data.dataset import Dataset
from trainer.data.sources import column
from trainer.data.stages import Removed
from trainer.data.stages.duplicates import ExactDuplicates
from trainer.errors import ConfigError, DataError, UserError
from trainer.tasks import BadRecord, Record

MIN_UNITS = 64  # not by the processes: the order must not depend on them
BATCH_RECORDS, BATCH_BYTES = 16384, 32 << 20
ROW_GROUP_BYTES = 64 << 20  # before compression
QUARANTINE = ("quarantine", 0)
AHEAD = 16  # tasks of each process that may wait for a slow one
NUM_TOLD = 5
FREE_TO_CHANGE = ("out", "processes", "max_bad_fraction", "report_only")  # what they are, the result is the same
NO_SPLIT = ("has no files for", "has the split train alone", "Bad split", "Unknown split")
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


def make_plan(options: argparse.Namespace, work: Path) -> Plan:
    """Look at the source. Raises UserError where it, a split or a column is missing."""
    named = {split: value or split for split, _, value in (text.partition("=") for text in options.splits)}
    wanted = named or {split: split for split in SPLITS}
    if unknown := set(wanted) - set(SPLITS):
        raise ConfigError(f"--splits {', '.join(unknown)} is not known; name some of {', '.join(SPLITS)}.")
    if options.drop_duplicates and "train" not in wanted:
        raise ConfigError("--drop-duplicates is for the split train, which --splits leaves out.")
    dataset = Plan(options, work, wanted).dataset()
    splits, units = {}, []
    for split, value in wanted.items():
        try:
            shards = dataset.source(split).shards
        except DataError as error:
            if named or split == "train" or not any(words in str(error) for words in NO_SPLIT):
                raise
            continue
        splits[split] = value
        units += [(split, index, name) for index, name in enumerate(shards)]
        dataset.check(split, [*options.columns, *(options.drop_duplicates if split == "train" else ())])
    return Plan(options, work, splits, units)


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


_worker: Worker


def _begin(plan: Plan) -> None:
    """Make this process a worker, which ends with its parent, whatever ends that."""
    global _worker
    _worker = Worker(plan)
    pa.set_cpu_count(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _call(method: str, *args: Any) -> Entry:
    entry: Entry = getattr(_worker, method)(*args)
    return entry


def run(plan: Plan, method: str, tasks: Sequence[tuple[Any, ...]]) -> Iterator[Entry]:
    """`Worker.method` of all tasks, shared by the processes; the results in order."""
    if plan.options.processes == 1:
        worker = Worker(plan)
        yield from (getattr(worker, method)(*task) for task in tasks)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(plan.options.processes, spawn, _begin, (plan,)) as pool:
        waiting: deque[Future[Entry]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(_call, method, *task))
                if len(waiting) == AHEAD * plan.options.processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for process in multiprocessing.active_children():
                process.kill()


def shown(results: Iterator[Entry], label: str, total: int) -> Iterator[Entry]:
    """`results`, with a bar on a terminal and else a line now and then."""
    if sys.stdout.isatty():
        from rich.progress import track

        yield from track(results, label, total)
        return
    told = time.monotonic()
    for number, result in enumerate(results, 1):
        if number == total or time.monotonic() - told > 10:
            told = time.monotonic()
            print(f"{label}: {number} of {total}", flush=True)
        yield result


def survey(plan: Plan) -> None:
    """Find the duplicates of train, once."""
    options, path = plan.options, plan.work / "duplicates"
    if not options.drop_duplicates or path.exists():
        return
    print("looking for duplicates", flush=True)
    records = plan.dataset().records("train")
    kept = ((id, record) for id, record in records if not isinstance(usable(record, options.columns), BadRecord))
    finding = ExactDuplicates(options.drop_duplicates).survey(kept)
    with written(path, plan.work) as file:
        pickle.dump(finding, file)


def read_units(plan: Plan, method: str, *args: Any) -> list[Entry]:
    """What all units are. Raises DataError where too many records are bad."""
    entries: list[Entry] = []
    read = bad = 0
    tasks = [(number, *args) for number in range(len(plan.units))]
    limit = plan.options.max_bad_fraction
    label = {"look": "units counted", "deal": "units read"}[method]
    for entry in shown(run(plan, method, tasks), label, len(tasks)):
        entries.append(entry)
        read += sum(entry["counts"].values())
        bad += entry["counts"]["bad"]
        if bad > limit * read and (read >= 1000 or len(entries) == len(tasks)):
            first = next(entry["first_bad"][0] for entry in entries if entry["first_bad"])
            raise DataError(
                f"{bad} of the first {read} records are bad, more than --max-bad-fraction {limit:g}; the first is"
                f" {first}. Mend the source, or raise it: the same command then goes on."
            )
    return entries


def summary(plan: Plan, entries: Sequence[Entry]) -> Entry:
    """What the units hold together."""
    counts: Counter[str] = sum((entry["counts"] for entry in entries), Counter())
    schema = unify([(entry["where"], entry["schema"]) for entry in entries])
    first = [reason for entry in entries for reason in entry["first_bad"]][:NUM_TOLD]
    return {
        "columns": {field.name: str(field.type) for field in schema},
        "records": {split: counts[split] for split in plan.outputs},
        "bad": {"records": counts["bad"], "first": first},
        "duplicates": counts["duplicates"],
    }


def is_finished(plan: Plan) -> bool:
    """Whether OUT is complete. Raises DataError where it is not of this command."""
    out, work = plan.options.out, plan.work
    manifest, begun = out / "manifest.json", work / "plan.json"
    for path in (manifest, begun):
        if path.is_file():
            refuse_others(json.loads(path.read_text(encoding="utf-8")), plan.identity(), out)
    if out.is_dir() and not manifest.is_file() and not begun.is_file() and any(path != work for path in out.iterdir()):
        raise DataError(f"{out} holds files that are not of this script. Choose a new or an empty folder.")
    return bool(manifest.is_file())


@contextmanager
def claimed(plan: Plan) -> Iterator[None]:
    """Hold OUT for this process. Raises DataError where another one does."""
    plan.work.mkdir(parents=True, exist_ok=True)
    with (plan.work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"Another process is preparing {plan.options.out}. Wait for it, or end it.") from None
        for half in plan.work.glob("*.half"):
            half.unlink(missing_ok=True)
        write_json(plan.work / "plan.json", plan.identity(), plan.work)
        yield


def refuse_others(there: Entry, now: Entry, out: Path) -> None:
    """Raise DataError where OUT was made or begun by another command, or from another source."""
    old, new = ({**one["arguments"], **dict.fromkeys(one["shards"], "a shard")} for one in (there, now))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if keys:
        lines = [f"  {key}: {old.get(key)} then, {new.get(key)} now" for key in keys[:8]]
        more = [f"  and {len(keys) - 8} more"] if len(keys) > 8 else []
        words = f"{out} was begun with other arguments. Give those again, or another folder, or remove it."
        raise DataError("\n".join([words, *lines, *more]))


def prepare(options: argparse.Namespace) -> None:
    """All of it. Raises UserError, or OSError where a disk is full or not ours."""
    if options.report_only:
        with tempfile.TemporaryDirectory() as work:
            plan = make_plan(options, Path(work))
            survey(plan)
            report = {"units": len(plan.units), **summary(plan, read_units(plan, "look"))}
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    plan = make_plan(options, options.out / ".parts")
    if is_finished(plan):
        print(f"{options.out} is finished and left as it is.")
    else:
        with claimed(plan):
            survey(plan)
            shards = num_files(plan)
            finish(plan, shards, read_units(plan, "deal", shards))
    shutil.rmtree(plan.work, ignore_errors=True)


def num_files(plan: Plan) -> dict[str, int]:
    """How many files each split is written to; where that takes counting, once."""
    options, path = plan.options, plan.work / "num_files.json"
    if not options.records_per_shard:
        return {split: options.shards if split == "train" else 1 for split in plan.outputs}
    if not path.exists():
        counted = summary(plan, read_units(plan, "look"))["records"]
        write_json(
            path, {split: max(1, -(-counted[split] // options.records_per_shard)) for split in counted}, plan.work
        )
    found: dict[str, int] = json.loads(path.read_text())
    return found


def finish(plan: Plan, shards: dict[str, int], entries: Sequence[Entry]) -> None:
    """From spools to output files, the quarantine and the manifest."""
    out, total = plan.options.out, summary(plan, entries)
    schema = unify([(entry["where"], entry["schema"]) for entry in entries])
    tasks = [(split, number, count, schema) for split, count in shards.items() for number in range(count)]
    files = list(shown(run(plan, "merge", tasks), "files written", len(tasks)))
    assert sum(file["records"] for file in files) == sum(total["records"].values()), "every record is in a file"
    with written(out / "quarantine.jsonl", plan.work) as file:
        for number in range(len(plan.units)):
            for record, _ in read_spool(plan.spool(number), QUARANTINE):
                file.write(json.dumps(record).encode() + b"\n")
    versions = {"shardwright": trainer.__version__, "pyarrow": pa.__version__, "python": platform.python_version()}
    write_json(out / "manifest.json", {**plan.identity(), **total, "files": files, "versions": versions}, plan.work)
    records = ", ".join(f"{split} {count:,}" for split, count in total["records"].items())
    print(f"{records} records in {len(files)} files in {out};", end=" ")
    print(f"{total['duplicates']:,} duplicates and {total['bad']['records']:,} bad records left out")


def number(kind: type[int] | type[float], low: float, high: float = float("inf")) -> Callable[[str], float]:
    """A number of the command line from `low` to below `high`."""

    def parsed(text: str) -> float:
        value = kind(text)
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to below {high:g}")
        return value

    return parsed


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names, share = lambda text: text.split(","), number(float, 0, 1)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("out", metavar="OUT", type=Path)
    add = parser.add_argument
    add("--name", help="configuration of a hub data set")
    add("--format", help="of the source, where its suffix does not tell")
    add("--splits", type=names, default=[], metavar="A,B", help="default: the source's; A=NAME: under another name")
    add(
        "--columns",
        type=names,
        default=[],
        metavar="A,B.C",
        help="columns that are kept, and must be there",
    )
    add("--shards", type=number(int, 1), default=96, help="files of train (default: 96)")
    add("--records-per-shard", type=number(int, 1), metavar="N", help="as many files of every split as that makes")
    add("--row-group", type=number(int, 1), default=1024, metavar="N", help="records (default: 1024)")
    add("--processes", type=number(int, 1), default=os.cpu_count() or 1, metavar="K", help="default: the cores")
    add("--shuffle-seed", type=int, default=0, metavar="S", help="deals the records to the files (default: 0)")
    add("--test-fraction", type=share, default=0.01, help="where the source has train alone (default: 0.01)")
    add("--validation-fraction", type=share, default=0.01, help="as --test-fraction")
    add(
        "--drop-duplicates",
        type=names,
        default=[],
        metavar="A,B.C",
        help="columns in which no two of train are equal",
    )
    add("--max-bad-fraction", type=share, default=0.01, help="of records that may be bad (default: 0.01)")
    add("--report-only", action="store_true", help="read everything, write nothing, tell what there is")
    options = parser.parse_args(words)
    if options.test_fraction + options.validation_fraction >= 1:
        parser.error("--test-fraction and --validation-fraction leave nothing for train")
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Run, and turn what went wrong into one message and an exit code."""
    options = parse(words)
    try:
        prepare(options)
        return 0
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except pa.ArrowException as error:
        problem = f"{str(error).rstrip('.')}. Leave that column out: --columns names the others."
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = "Free some space" if full else "Choose a folder that can be written"
        problem = f"{error.filename or options.out}: {error.strerror or error}. {cure}; the same command then goes on."
    except BrokenProcessPool:
        problem = "A process was killed, perhaps for want of memory. With fewer --processes the same command goes on."
    except KeyboardInterrupt:
        print("Stopped; the same command goes on.", file=sys.stderr)
        return 130
    print(problem, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
