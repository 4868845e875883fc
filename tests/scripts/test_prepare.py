"""scripts/data/prepare.py: every record once, the same bytes however it is run, killed or not, and clear words."""

from __future__ import annotations

import errno
import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prepare
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import spools

from trainer.data.dataset import Dataset

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"en": f"word {number}", "de": f"Wort „{number}“"} for number in range(60)]
FEW = ("--shards", "4", "--processes", "1", "--test-fraction", "0", "--validation-fraction", "0")


def command(*words: object) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "data" / "prepare.py"), *map(str, words)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def call(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), text=True, capture_output=True, timeout=120, env=environment())


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def rows_of(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob(f"{split}-*.parquet")) for row in pq.read_table(path).to_pylist()]


def keys(rows: list[dict[str, Any]]) -> Counter[str]:
    return Counter(json.dumps(row, sort_keys=True) for row in rows)


def sums(folder: Path) -> dict[str, str]:
    """SHA-256 of all that is in a folder, hidden or not."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def table(separator: str) -> bytes:
    return "".join(f"{row['en']}{separator}{row['de']}\n" for row in [{"en": "en", "de": "de"}, *ROWS]).encode()


def arrow() -> bytes:
    sink, whole = io.BytesIO(), pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(sink, whole.schema) as writer:
        writer.write_table(whole, 7)
    return sink.getvalue()


def parquet(rows: list[Any] = ROWS) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=7)
    return sink.getvalue()


def tar() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for number, row in enumerate(ROWS):
            for side, text in row.items():
                member = tarfile.TarInfo(f"{number:03}.{side}.txt")
                member.size = len(text.encode())
                archive.addfile(member, io.BytesIO(text.encode()))
    return sink.getvalue()


FORMATS: dict[str, Callable[[], bytes]] = {
    "jsonl": lambda: json_lines(ROWS),
    "jsonl.gz": lambda: gzip.compress(json_lines(ROWS)),
    "csv": lambda: table(","),
    "tsv": lambda: table("\t"),
    "txt": lambda: "".join(row["en"] + "\n" for row in ROWS).encode(),
    "parquet": parquet,
    "arrow": arrow,
    "tar": tar,
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_every_record_once_and_trains(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"all.{suffix}").write_bytes(FORMATS[suffix]())
    out = tmp_path / "out"
    assert prepare.main([str(tmp_path / f"all.{suffix}"), str(out), *FEW]) == 0
    dataset = Dataset("data", str(out))
    names = [f"train-{number:05d}-of-00004.parquet" for number in range(4)]
    assert list(dataset.source("train").shards) == names
    found = [record for _, record in dataset.records("train")]
    if suffix == "txt":
        assert sorted(row["text"] for row in found) == sorted(row["en"] for row in ROWS)
    elif suffix == "tar":
        assert {(row["en.txt"], row["de.txt"]) for row in found} == {(row["en"], row["de"]) for row in ROWS}
    else:
        dataset.check("train", ["en", "de"])
        assert keys(found) == keys(ROWS)
    manifest = manifest_of(out)
    assert manifest["records"] == {"train": 60} and manifest["bad"]["records"] == manifest["duplicates"] == 0
    there = sums(out)
    assert {file["file"]: file["sha256"] for file in manifest["files"]}.items() <= there.items()
    assert set(there) == {*names, "manifest.json", "quarantine.jsonl"}


def test_folder_hub_repository_glob_and_url(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, rows in {"train-0": ROWS[:30], "train-1": ROWS[30:50], "validation": ROWS[50:]}.items():
        (source / f"{name}.jsonl").write_bytes(json_lines(rows))
    own = {"train": 50, "validation": 10}
    assert prepare.main([str(source), str(tmp_path / "folder"), "--processes", "1"]) == 0
    assert manifest_of(tmp_path / "folder")["records"] == own
    assert len(list((tmp_path / "folder").glob("train-*-of-00096.parquet"))) == 96
    assert keys(rows_of(tmp_path / "folder", "validation")) == keys(ROWS[50:])
    picked = ["--splits", "train=validation,test=train-1*", "--processes", "1"]
    assert prepare.main([str(source), str(tmp_path / "picked"), *picked]) == 0
    assert manifest_of(tmp_path / "picked")["records"] == {"train": 10, "test": 20}
    assert prepare.main([str(source / "train-*.jsonl"), str(tmp_path / "glob"), *FEW]) == 0
    assert keys(rows_of(tmp_path / "glob")) == keys(ROWS[:50])
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=source)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/train-0.jsonl"
        assert prepare.main([url, str(tmp_path / "url"), *FEW]) == 0
        server.shutdown()
    assert keys(rows_of(tmp_path / "url")) == keys(ROWS[:30])
    splits = "".join(f"      - {{split: {split}, path: '{split}*.jsonl'}}\n" for split in own)
    (source / "README.md").write_text(f"---\nconfigs:\n  - config_name: default\n    data_files:\n{splits}---\n")
    assert prepare.main([str(source), str(tmp_path / "hub"), "--shards", "2", "--processes", "1"]) == 0
    assert manifest_of(tmp_path / "hub")["records"] == own


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], list[Any]]:
    """(a source of 40 shards, the sums of what one process made of it without a pause, all records)."""
    folder = tmp_path_factory.mktemp("large")
    source = folder / "source"
    source.mkdir()
    rows = [{"id": number, "text": f"number {number} " * (number % 40)} for number in range(40_000)]
    for number in range(40):
        (source / f"train-{number:02}.jsonl").write_bytes(json_lines(rows[number::40]))
    done = call(source, folder / "whole", "--shards", 6, "--processes", 1)
    assert done.returncode == 0, done.stderr
    return source, sums(folder / "whole"), rows


def test_two_processes_make_the_same_bytes(large: tuple[Path, dict[str, str], list[Any]], tmp_path: Path) -> None:
    source, expected, rows = large
    done = call(source, tmp_path / "out", "--shards", 6, "--processes", 2)
    assert done.returncode == 0, done.stderr
    assert "files written: 8 of 8" in done.stdout
    assert sums(tmp_path / "out") == expected
    found = [row for split in ("train", "validation", "test") for row in rows_of(tmp_path / "out", split)]
    assert keys(found) == keys(rows)
    for split in ("validation", "test"):
        assert 300 < len(rows_of(tmp_path / "out", split)) < 500
    first = pq.ParquetFile(tmp_path / "out" / "train-00000-of-00006.parquet").metadata
    assert first.row_group(0).num_rows == 1024 and first.row_group(0).column(0).compression == "ZSTD"
    assert prepare.main([str(source), str(tmp_path / "seed"), "--shards", "6", "--shuffle-seed", "1"]) == 0
    assert sums(tmp_path / "seed")["train-00000-of-00006.parquet"] != expected["train-00000-of-00006.parquet"]


@pytest.mark.parametrize("pattern", [".parts/*.spool", "train-*.parquet"])
def test_killed_and_started_again(
    large: tuple[Path, dict[str, str], list[Any]], tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected, _ = large
    out = tmp_path / "out"
    words = [str(source), str(out), "--shards", "6", "--processes"]
    with subprocess.Popen(command(*words, 2), stdout=subprocess.DEVNULL, env=environment()) as process:
        while len(list(out.glob(pattern))) < 2:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (out / "manifest.json").exists()
    (out / ".parts" / "7.spool.1234.half").write_bytes(b"half of a spool")
    done = {path: path.stat().st_ino for path in out.glob(pattern)}
    remade = []
    deal = spools.Worker._deal
    monkeypatch.setattr(
        spools.Worker, "_deal", lambda self, number, *args: remade.append(number) or deal(self, number, *args)
    )
    assert prepare.main([*words, "1"]) == 0
    assert sums(out) == expected
    if pattern.endswith("spool"):
        assert remade and not {out / ".parts" / f"{number}.spool" for number in remade} & set(done)
    else:
        assert not remade and all(path.stat().st_ino == inode for path, inode in done.items())


def test_interrupted_in_a_word(large: tuple[Path, dict[str, str], list[Any]], tmp_path: Path) -> None:
    source, expected, _ = large
    words = (source, tmp_path / "out", "--shards", 6, "--processes", 2)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell has started by & ignores it
    with subprocess.Popen(command(*words), env=environment(), preexec_fn=heard, **quiet) as process:
        while len(list(tmp_path.glob("out/.parts/*.spool"))) < 2:
            assert process.poll() is None, "it ended before it could be interrupted"
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate()[1] == "Stopped; the same command goes on.\n" and process.returncode == 130
    assert call(*words).returncode == 0 and sums(tmp_path / "out") == expected


def test_finished_other_arguments_and_foreign_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_bytes(json_lines(ROWS))
    words = [str(source), str(out), *FEW]
    assert prepare.main(words) == 0
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare.main([*words, "--processes", "2"]) == 0
    assert "is finished and left as it is" in capsys.readouterr().out
    assert prepare.main([*words, "--shards", "5", "--columns", "en"]) == 2
    told = capsys.readouterr().err
    assert "shards: 4 then, 5 now" in told and "columns: [] then, ['en'] now" in told and "row_group" not in told
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert prepare.main([str(source), str(tmp_path), *FEW]) == 2
    assert "holds files that are not of this script" in capsys.readouterr().err


def test_only_one_process_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(ROWS))
    words = [str(tmp_path / "a.jsonl"), str(tmp_path / "out"), *FEW]
    with prepare.claimed(prepare.make_plan(prepare.parse(words), tmp_path / "out" / ".parts")):
        assert prepare.main(words) == 2
    assert "Another process" in capsys.readouterr().err
    assert prepare.main(words) == 0


def test_equal_records_are_in_one_split(tmp_path: Path) -> None:
    rows = [{"text": f"line {number % 50}", "n": [number % 50]} for number in range(500)]
    rows = [dict(sorted(row.items(), reverse=number % 3 == 0)) for number, row in enumerate(rows)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(rows))
    out = tmp_path / "out"
    words = ["--shards", "3", "--processes", "1", "--validation-fraction", "0.3", "--test-fraction", "0.3"]
    assert prepare.main([str(tmp_path / "a.jsonl"), str(out), *words]) == 0
    texts = [{row["text"] for row in rows_of(out, split)} for split in ("train", "validation", "test")]
    assert all(texts) and sum(map(len, texts)) == 50 == len(set.union(*texts))
    assert sum(manifest_of(out)["records"].values()) == 500


def test_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"text": f"Line  {number % 40}", "meta": {"id": number}} for number in range(100)]
    rows.insert(0, {"text": "line 7"})  # without `meta`: bad, so no reason to drop the next one
    (tmp_path / "a.jsonl").write_bytes(json_lines(rows[1:2] + rows[:1] + rows[2:]))
    out = tmp_path / "out"
    words = ["--drop-duplicates", "text", "--columns", "text,meta.id", "--max-bad-fraction", "0.5"]
    assert prepare.main([str(tmp_path / "a.jsonl"), str(out), *FEW, *words]) == 0
    assert sorted(row["meta"]["id"] for row in rows_of(out)) == list(range(40))
    assert manifest_of(out)["duplicates"] == 60 and manifest_of(out)["bad"]["records"] == 1


def test_bad_records_are_kept_aside_and_too_many_stop_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = json_lines(ROWS).splitlines(keepends=True)
    half = b'{"en": "half a surrogate \\ud800", "de": ""}\n'
    (tmp_path / "a.jsonl").write_bytes(b"".join([*lines[:3], b"{not json\n", half, *lines[3:]]))
    words = [str(tmp_path / "a.jsonl"), str(tmp_path / "out"), *FEW]
    assert prepare.main(words) == 2
    told = capsys.readouterr().err
    assert "2 of the first 62 records are bad" in told and "train/a.jsonl:3: line 4 is not JSON" in told
    assert prepare.main([*words, "--max-bad-fraction", "0.1"]) == 0
    assert keys(rows_of(tmp_path / "out")) == keys(ROWS)
    bad = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["split"], row["id"]) for row in bad] == [("train", "a.jsonl:3"), ("train", "a.jsonl:4")]
    assert "surrogates not allowed" in bad[1]["reason"]
    assert manifest_of(tmp_path / "out")["bad"]["records"] == 2


def test_columns_and_types(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [{"a": {"b": number, "c": "x"}, "n": number, "m": "text"} for number in range(9)]
    rows[4]["n"], rows[5]["more"], rows[6]["m"] = 0.5, [1], 3
    for number in range(3):
        (tmp_path / f"train-{number}.jsonl").write_bytes(json_lines(rows[number::3]))
    source = str(tmp_path / "train-*.jsonl")
    assert prepare.main([source, str(tmp_path / "mixed"), *FEW]) == 2
    assert "Column m is string in train/train-0.jsonl:0, but int64 in train/train-0.jsonl:2" in capsys.readouterr().err
    assert prepare.main([source, str(tmp_path / "wrong"), *FEW, "--columns", "a.b,x"]) == 2
    assert "no column x; there are a.b, a.c, n, m" in capsys.readouterr().err
    assert prepare.main([source, str(tmp_path / "out"), *FEW, "--columns", "a.b,n"]) == 0
    assert sorted(row["a"]["b"] for row in rows_of(tmp_path / "out")) == list(range(9))
    assert manifest_of(tmp_path / "out")["columns"] == {"a": "struct<b: int64>", "n": "double"}
    schemas = {str(pq.read_schema(path)) for path in (tmp_path / "out").glob("*.parquet")}
    assert len(schemas) == 1
    (tmp_path / "some.jsonl").write_bytes(json_lines([{"a": 1}, {"a": 2, "b": {"c": 1}}, {"b": {"d": "x"}}]))
    assert prepare.main([str(tmp_path / "some.jsonl"), str(tmp_path / "some"), *FEW, "--shards", "1"]) == 0
    assert rows_of(tmp_path / "some") == [
        {"a": 1, "b": None},
        {"a": 2, "b": {"c": 1, "d": None}},
        {"a": None, "b": {"c": None, "d": "x"}},
    ]


def test_records_per_shard_and_report_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet([{"tokens": [number, 1], "n": number} for number in range(60)]))
    words = [str(tmp_path / "a.parquet"), str(tmp_path / "out"), *FEW, "--records-per-shard", "25"]
    assert prepare.main([*words, "--report-only"]) == 0
    report = json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))
    assert report["records"] == {"train": 60} and report["columns"] == {"tokens": "list<item: int64>", "n": "int64"}
    assert not (tmp_path / "out").exists()
    assert prepare.main([*words, "--row-group", "5"]) == 0
    files = sorted((tmp_path / "out").glob("*.parquet"))
    assert [path.name for path in files] == [f"train-{number:05d}-of-00003.parquet" for number in range(3)]
    assert pq.ParquetFile(files[0]).metadata.row_group(0).num_rows == 5
    assert sorted(row["n"] for row in rows_of(tmp_path / "out")) == list(range(60))


def test_mistakes_and_disks_are_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(json_lines(ROWS))
    assert prepare.main([str(source), str(source / "out"), *FEW]) == 2
    assert "Choose a folder that can be written" in capsys.readouterr().err
    assert prepare.main([str(tmp_path / "none.jsonl"), str(tmp_path / "out"), *FEW]) == 2
    assert "no such file" in capsys.readouterr().err
    assert prepare.main([str(source), str(tmp_path / "out"), *FEW, "--splits", "train,dev"]) == 2
    assert "dev is not known; name some of train, validation, test" in capsys.readouterr().err
    assert prepare.main([str(source), str(tmp_path / "out"), *FEW, "--splits", "train,test"]) == 2
    assert "has the split train alone" in capsys.readouterr().err
    with monkeypatch.context() as patched:

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patched.setattr(os, "fsync", full)
        assert prepare.main([str(source), str(tmp_path / "out"), *FEW]) == 2
    assert "No space left on device. Free some space; the same command then goes on." in capsys.readouterr().err
    assert prepare.main([str(source), str(tmp_path / "out"), *FEW]) == 0
    assert keys(rows_of(tmp_path / "out")) == keys(ROWS)
    source.write_bytes(b'{"a": {}, "b": 1}\n')
    assert prepare.main([str(source), str(tmp_path / "empty"), *FEW]) == 2
    assert "no child field" in capsys.readouterr().err
    assert prepare.main([str(source), str(tmp_path / "some"), *FEW, "--columns", "b"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        prepare.main([str(source), str(tmp_path / "out"), "--shards", "0"])
    assert stop.value.code == 2 and "0 is not from 1" in capsys.readouterr().err
