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
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from corpora import SPLITS
from spools import NUM_TOLD, QUARANTINE, Entry, Plan, Worker, read_spool, unify, usable, write_json, written

import trainer
from trainer.data.stages.duplicates import ExactDuplicates
from trainer.errors import ConfigError, DataError, UserError
from trainer.tasks import BadRecord

AHEAD = 16  # tasks of each process that may wait for a slow one
NO_SPLIT = ("has no files for", "has the split train alone", "Bad split", "Unknown split")


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
