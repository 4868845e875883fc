"""Files as shards: cutting them into parts, and the formats that need more than a line a record."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.data import files
from trainer.data.files import RANGES, FileSource
from trainer.data.hub import HubSource
from trainer.errors import DataError
from trainer.tasks import BadRecord

ROWS = [{"n": number, "text": f"word {number}"} for number in range(1000)]
LINES = [json.dumps(row) + "\n" for row in ROWS]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of kilobytes instead of megabytes."""
    monkeypatch.setattr(files, "SMALLEST", 1 << 10)
    monkeypatch.setattr(files, "LARGEST", 16 << 10)


def everything(source: FileSource) -> list[Any]:
    return [record for index in range(len(source.shards)) for record in source.open(index, 0)]


def check_every_offset(source: FileSource) -> None:
    for index in range(len(source.shards)):
        records = list(source.open(index, 0))
        for offset in {0, 1, len(records) // 2, len(records) - 1, len(records), len(records) + 3} - {-1}:
            assert list(source.open(index, offset)) == records[offset:]


LINE = st.one_of(
    st.just(b""),
    st.just(b" \t"),
    st.just(b'{"x": 1}'),
    st.just(b'{"x": '),
    st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=12).map(lambda text: text.encode()),
    st.integers(0, 60).map(lambda size: json.dumps({"y": "é" * size}, ensure_ascii=False).encode()),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(LINE, max_size=40),
    end=st.sampled_from([b"\n", b"\r\n"]),
    final=st.booleans(),
    mark=st.booleans(),
    num_shards=st.integers(1, 30),
    sizes=st.sampled_from([(1, 7), (8, 64), (50, 400)]),
    form=st.sampled_from(["jsonl", "text"]),
)
def test_parts_of_lines_hold_every_record_once_and_in_order(
    tmp_path: Path,
    lines: list[bytes],
    end: bytes,
    final: bool,
    mark: bool,
    num_shards: int,
    sizes: tuple[int, int],
    form: str,
) -> None:
    content = (b"\xef\xbb\xbf" if mark else b"") + end.join(lines) + (end if final else b"")
    path = tmp_path / "x.data"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "SMALLEST", 1 << 30)
        patch.setattr(files, "LARGEST", 1 << 30)
        whole = FileSource([str(path)], ["x"], form)
        assert whole.shards == ["x"]
        patch.setattr(files, "SMALLEST", sizes[0])
        patch.setattr(files, "LARGEST", sizes[1])
        source = FileSource([str(path)], ["x"], form, num_shards)

    def comparable(record: Any) -> Any:  # a part tells the byte, a file the line
        return "bad" if isinstance(record, BadRecord) else record

    records = [[comparable(record) for record in source.open(index, 0)] for index in range(len(source.shards))]
    assert [record for part in records for record in part] == [comparable(record) for record in whole.open(0, 0)]
    for index, part in enumerate(records):
        for offset in range(len(part) + 2):
            assert [comparable(record) for record in source.open(index, offset)] == part[offset:]


def test_one_file_is_cut_into_the_shards_asked_for(tmp_path: Path, small_parts: None) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(LINES))
    size = path.stat().st_size
    assert FileSource([str(path)], ["x.jsonl"]).shards == ["x.jsonl@0", "x.jsonl@16384"]
    source = FileSource([str(path)], ["x.jsonl"], min_shards=8)
    step = max(size // (8 * RANGES), 1024)  # as small_parts says
    assert source.shards == [f"x.jsonl@{begin}" for begin in range(0, size, step)] and source.uncut is None
    assert everything(source) == ROWS
    check_every_offset(source)
    # never finer than makes sense, and then nobody is to blame
    source = FileSource([str(path)], ["x.jsonl"], min_shards=1000)
    assert len(source.shards) == -(-size // 1024) and source.uncut is None
    # the size of parts goes by all files
    (tmp_path / "y.jsonl").write_text("".join(LINES[:20]))
    source = FileSource([str(path), str(tmp_path / "y.jsonl")], ["x.jsonl", "y.jsonl"], min_shards=8)
    assert source.shards[-1] == "y.jsonl" and len(source.shards) > 8
    assert everything(source) == ROWS + ROWS[:20]


def test_a_line_longer_than_parts_belongs_to_the_one_it_begins_in(tmp_path: Path, small_parts: None) -> None:
    rows = [{"n": 0}, {"n": "x" * 50_000}, {"n": 2}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FileSource([str(tmp_path / "x.jsonl")], ["x"], min_shards=20)
    records = [list(source.open(index, 0)) for index in range(len(source.shards))]
    assert (
        records[0] == rows[:2] and [row for part in records[1:] for row in part] == rows[2:] and not any(records[1:15])
    )


def test_bad_lines_of_a_part_are_told_by_their_byte(tmp_path: Path, small_parts: None) -> None:
    content = "".join(LINES[:100]) + '{"n": \n' + "".join(LINES[100:])
    (tmp_path / "x.jsonl").write_text(content)
    records = everything(FileSource([str(tmp_path / "x.jsonl")], ["x"], min_shards=10))
    place = content.index('{"n": \n')
    assert len(records) == 1001 and records[100].reason.startswith(f"the line at byte {place} is not JSON: ")


def test_small_files_and_enough_files_stay_whole(tmp_path: Path) -> None:
    names = [f"{index}.jsonl" for index in range(4)]
    for name in names:
        (tmp_path / name).write_text("".join(LINES))
    for min_shards in (1, 4, 48):
        source = FileSource([str(tmp_path / name) for name in names], names, min_shards=min_shards)
        assert source.shards == names and source.uncut is None
        assert everything(source) == ROWS * 4


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("x.jsonl.gz", "is compressed, so it cannot be split"),
        ("x.csv", "is CSV, which cannot be split"),
        ("x.tsv", "is TSV, which cannot be split"),
        ("x.tar", "is a tar archive, which cannot be split"),
    ],
)
def test_what_cannot_be_cut_is_named(tmp_path: Path, small_parts: None, name: str, why: str) -> None:
    (tmp_path / "a.jsonl").write_text(LINES[0])
    (tmp_path / name).write_bytes(b"0123456789" * 2000)
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / name)]
    source = FileSource(paths, ["a.jsonl", name], min_shards=8)
    assert source.shards == ["a.jsonl", name] and source.uncut == f"{name} {why}"
    assert FileSource(paths, ["a.jsonl", name], min_shards=2).uncut is None
    (tmp_path / name).write_bytes(b"0123456789")
    assert FileSource(paths, ["a.jsonl", name], min_shards=8).uncut is None


def test_parquet_is_cut_into_row_groups(tmp_path: Path, small_parts: None) -> None:
    path = str(tmp_path / "x.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=300)
    assert FileSource([path], ["x.parquet"]).shards == ["x.parquet"]
    source = FileSource([path], ["x.parquet"], min_shards=2)
    assert source.shards == [f"x.parquet@row_group_{index}" for index in range(4)]
    assert list(source.open(1, 0)) == ROWS[300:600] and everything(source) == ROWS
    check_every_offset(source)
    assert FileSource([path], ["x.parquet"], min_shards=4).uncut is None
    pq.write_table(pa.Table.from_pylist(ROWS), path, compression="none")
    source = FileSource([path], ["x.parquet"], min_shards=4)
    assert source.shards == ["x.parquet"] and everything(source) == ROWS
    assert source.uncut == "x.parquet has no finer pieces than its row groups"


def write_arrow(path: Path, kind: str) -> None:
    table = pa.Table.from_pylist([row | {"ids": [row["n"], 1]} for row in ROWS])
    if kind == "datasets":
        datasets.Dataset(table).save_to_disk(str(path.parent / "saved"), max_shard_size="1GB")
        (path.parent / "saved" / "data-00000-of-00001.arrow").rename(path)
        return
    with pa.OSFile(str(path), "wb") as file:
        writer = pa.ipc.new_stream(file, table.schema) if kind == "stream" else pa.ipc.new_file(file, table.schema)
        with writer:
            for batch in table.to_batches(max_chunksize=70):
                writer.write_batch(batch)


@pytest.mark.parametrize("kind", ["stream", "file", "datasets"])
def test_arrow_files_of_both_kinds(tmp_path: Path, small_parts: None, kind: str) -> None:
    path = tmp_path / "x.arrow"
    write_arrow(path, kind)

    def plain(records: list[Any]) -> list[Any]:
        assert all(
            isinstance(record["ids"], np.ndarray) and record["ids"].tolist() == [record["n"], 1] for record in records
        )
        return [{"n": record["n"], "text": record["text"]} for record in records]

    whole = FileSource([str(path)], ["x.arrow"])
    assert whole.shards == ["x.arrow"]
    for offset in (0, 69, 70, 71, 699, 999, 1000, 2000):
        assert plain(list(whole.open(0, offset))) == ROWS[offset:]
    source = FileSource([str(path)], ["x.arrow"], min_shards=5)
    if kind == "datasets":
        assert source.shards == ["x.arrow"] and source.uncut == "x.arrow has no finer pieces than its record batches"
        return
    assert len(source.shards) >= 5 and source.uncut is None
    assert plain(everything(source)) == ROWS
    begin, end = (int(name.removeprefix("x.arrow@batch_")) * 70 for name in source.shards[2:4])
    for offset in (0, 30, 100, 139, 140, 300):
        assert plain(list(source.open(2, offset))) == ROWS[begin + offset : end]


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_an_arrow_file_cut_short_is_an_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.arrow"
    write_arrow(path, kind)
    path.write_bytes(path.read_bytes()[:-3000])
    for min_shards in (1, 9):
        with pytest.raises(DataError, match=r"x.arrow: cannot be read"):
            everything(FileSource([str(path)], ["x.arrow"], min_shards=min_shards))
    path.write_text("".join(LINES))
    with pytest.raises(DataError, match=r"x.arrow: the file is not arrow: it begins with"):
        everything(FileSource([str(path)], ["x.arrow"]))


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_tar(path: Path, count: int = 50) -> list[Any]:
    """An archive of samples; every tenth is broken. Returns what is to be read."""
    expected: list[Any] = []
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        folder = tarfile.TarInfo("part")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for number in range(count):
            add(archive, f"part/{number:04}.Jpg", bytes([number]) * number)
            add(archive, f"part/{number:04}.txt", f"Größe {number}".encode())
            add(archive, f"part/{number:04}.cls", b"x" if number % 10 == 7 else b"%d\n" % number)
            add(archive, f"part/{number:04}.info.json", json.dumps({"n": number}).encode())
            add(archive, "README", b"no sample")
            expected.append(
                {
                    "__key__": f"part/{number:04}",
                    "jpg": bytes([number]) * number,
                    "txt": f"Größe {number}",
                    "cls": number,
                    "info.json": {"n": number},
                }
            )
            if number % 10 == 7:
                reason = f"part/{number:04}.cls: invalid literal for int() with base 10: b'x'"
                expected[-1] = BadRecord(reason)
    content = plain.getvalue()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return expected


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_a_tar_archive_holds_samples(tmp_path: Path, name: str) -> None:
    expected = write_tar(tmp_path / name)
    source = FileSource([str(tmp_path / name)], [name])
    for offset in (0, 1, 7, 8, 49, 50, 99):
        assert list(source.open(0, offset)) == expected[offset:]


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_a_tar_archive_cut_short_anywhere_is_an_error(tmp_path: Path, name: str) -> None:
    expected = write_tar(tmp_path / name, 7)
    whole = (tmp_path / name).read_bytes()
    archive = gzip.decompress(whole) if name.endswith("gz") else whole
    for end in (512 * 9, 512 * 9 + 100, 512 * 10, 512 * 10 + 1):
        (tmp_path / name).write_bytes(gzip.compress(archive[:end]) if name.endswith("gz") else archive[:end])
        records = []
        with pytest.raises(DataError, match=rf"{name}: cannot be read at record \d+: ") as caught:
            records.extend(FileSource([str(tmp_path / name)], [name]).open(0, 0))
        assert records == expected[: len(records)] and f"record {len(records)}: " in str(caught.value)


def test_a_damaged_tar_archive_does_not_end_early(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", 7)
    spoilt = bytearray((tmp_path / "x.tar").read_bytes())
    spoilt[spoilt.index(b"part/0003.Jpg") + 5] = ord("z")
    (tmp_path / "x.tar").write_bytes(spoilt)
    with pytest.raises(DataError, match=r"x.tar: cannot be read at record 2: cut short or damaged at byte"):
        everything(FileSource([str(tmp_path / "x.tar")], ["x.tar"]))


def test_members_of_the_same_name_are_a_bad_record(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("a.txt", "a.txt", "b.txt"):
            add(archive, name, b"text")
    assert everything(FileSource([str(tmp_path / "x.tar")], ["x.tar"])) == [
        BadRecord("a.txt: it is there twice"),
        {"__key__": "b", "txt": "text"},
    ]


def test_parquet_is_read_a_row_group_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "x.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=100)
    asked: list[Any] = []
    plain = pq.ParquetFile.iter_batches

    def watched(self: Any, *args: Any, **options: Any) -> Iterator[Any]:
        asked.append(list(options["row_groups"]))
        yield from plain(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    rows = FileSource([path], ["x"]).open(0, 250)
    assert next(rows) == ROWS[250] and asked == [[2]]
    assert list(rows) == ROWS[251:] and asked[-1] == [9]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])  # one has features, the other none
def test_shards_of_a_hub_repository_are_opened_at_any_record(tmp_path: Path, suffix: str) -> None:
    for index in range(2):
        half = ROWS[index * 500 : index * 500 + 500]
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(half), tmp_path / f"part-{index}.parquet", row_group_size=250)
        else:
            (tmp_path / f"part-{index}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in half))
    card = f"configs:\n- config_name: words\n  data_files:\n  - split: train\n    path: part-*.{suffix}\n"
    (tmp_path / "README.md").write_text(f"---\n{card}---\n")
    source = HubSource(str(tmp_path), "words", "train", min_shards=4)
    size = 1000 // len(source.shards)
    assert size == (250 if suffix == "parquet" else 500)
    for index in range(len(source.shards)):
        for offset in (0, 1, 99, 249, size, size + 1):
            assert list(source.open(index, offset)) == ROWS[index * size + offset : (index + 1) * size]
