"""Files of all formats, local and by URL; hub repositories; and what is said when they are not as expected."""

from __future__ import annotations

import bz2
import csv
import gzip
import http.server
import json
import lzma
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from trainer.data.corpus import Corpus
from trainer.data.dataset import Dataset
from trainer.data.sources import column
from trainer.data.stream import StreamData
from trainer.errors import ConfigError, DataError
from trainer.tasks import BadRecord, Encoded, Record

ROWS = [{"en": f"word {number}", "de": f"Wort, „{number}“"} for number in range(50)]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def json_lines(rows: Sequence[Any] = ROWS) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_format(path: Path, form: str) -> None:
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
        return
    plain = path.with_suffix(".plain")
    if form == "jsonl":
        plain.write_bytes(json_lines())
    else:
        with plain.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["en", "de"], delimiter="\t" if form == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(plain.read_bytes()))
    plain.unlink()


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv"])
def test_lines_of_every_format_and_compression_are_read_from_any_record(tmp_path: Path, form: str, suffix: str) -> None:
    path = tmp_path / f"pairs.{form}{suffix}"
    write_format(path, form)
    source = Dataset("data", str(path)).source("train")
    assert source.shards == [path.name]
    for offset in (0, 1, 49, 50, 99):
        assert list(source.open(0, offset)) == ROWS[offset:]


def test_parquet_is_read_from_any_record_and_earlier_row_groups_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    write_format(path, "parquet")
    source = Dataset("data", str(path)).source("train")
    for offset in (0, 6, 7, 8, 49, 50, 99):
        assert list(source.open(0, offset)) == ROWS[offset:]
    spoilt = bytearray(path.read_bytes())
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    spoilt[4 : group.dictionary_page_offset or group.data_page_offset] = b"\0" * (
        (group.dictionary_page_offset or group.data_page_offset) - 4
    )
    path.write_bytes(spoilt)
    assert list(source.open(0, 7)) == ROWS[7:]
    with pytest.raises(DataError, match=r"pairs.parquet: cannot be read at record 0"):
        list(source.open(0, 0))


def test_parquet_lists_of_numbers_come_as_arrays(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"pixels": [[1.0, 2.0], [3.0]], "words": [["a"], []], "label": [3, None]}), tmp_path / "x.parquet"
    )
    (_, first), (_, second) = Dataset("data", str(tmp_path / "x.parquet")).records("train")
    assert isinstance(first["pixels"], np.ndarray) and first["pixels"].tolist() == [1.0, 2.0]
    assert second["pixels"].tolist() == [3.0] and (first["words"], second["words"]) == (["a"], [])
    assert (first["label"], second["label"]) == (3, None)


def test_text_lines_are_a_column_and_blank_lines_are_no_records(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n two \n   \nthree")
    assert [record["text"] for _, record in Dataset("data", str(tmp_path / "book.txt")).records("train")] == [
        "one",
        " two ",
        "three",
    ]


def test_rows_that_cannot_be_parsed_are_bad_records_that_name_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"x": 1}\n\n[2]\n{"x": \n{"x": "\xff"}\n{"x": 5}\n')
    _, *bad, last = Dataset("data", str(tmp_path / "a.jsonl")).source("train").open(0, 0)
    assert [record.reason.split(" is ")[0] for record in bad] == ["line 3", "line 4", "line 5"]
    assert last == {"x": 5}
    (tmp_path / "b.csv").write_bytes(b'x,y\n1,"a\nb"\n2\n3,\xff\n4,d\n')
    first, *bad, last = Dataset("data", str(tmp_path / "b.csv")).source("train").open(0, 0)
    assert [record.reason for record in bad] == ["line 4 has 1 fields, the header 2", "line 5 is not UTF-8"]
    assert first == {"x": "1", "y": "a\nb"} and last == {"x": "4", "y": "d"}


def test_frames_of_zstandard_are_all_read_and_a_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl.zst"
    frames = zstandard.compress(json_lines(ROWS[:20])) + zstandard.compress(json_lines(ROWS[20:]))
    path.write_bytes(frames)
    assert [record for _, record in Dataset("data", str(path)).records("train")] == ROWS
    path.write_bytes(frames[:-20])
    with pytest.raises(DataError, match=r"pairs.jsonl.zst: cannot be read at record"):
        list(Dataset("data", str(path)).records("train"))


def test_a_folder_holds_splits_by_name_or_glob(tmp_path: Path) -> None:
    for name in ("train-1.jsonl", "train-0.jsonl", "test.jsonl.gz", "valid/part.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(json_lines()) if name.endswith("gz") else json_lines())
    (tmp_path / "train.md").write_text("no data")
    data = Dataset("data", str(tmp_path), validation="valid")
    assert data.source("train").shards == ["train-0.jsonl", "train-1.jsonl"]
    assert data.source("test").shards == ["test.jsonl.gz"]
    assert data.source("validation").shards == ["valid/part.jsonl"]
    assert Dataset("data", str(tmp_path), train="*-1.jsonl").source("train").shards == ["train-1.jsonl"]
    assert Dataset("data", str(tmp_path / "train-*.jsonl")).source("train").shards == ["train-0.jsonl", "train-1.jsonl"]
    beside = Dataset("data", str(tmp_path / "train-0.jsonl"), validation=str(tmp_path / "test.jsonl.gz"))
    assert beside.source("validation").shards == ["test.jsonl.gz"]
    with pytest.raises(
        DataError, match=r"no files for data.test=exam; it holds test.jsonl.gz, train-0.jsonl, train-1.jsonl, valid"
    ):
        Dataset("data", str(tmp_path), test="exam").source("test")


def test_packaged_corpora_have_three_splits() -> None:
    data = Dataset("data", "corpora:homeassistant_en_de")
    for split in ("train", "validation", "test"):
        data.check(split, ["en", "de"])
    with pytest.raises(DataError, match=r"corpora:nothing: no such packaged corpus; there are .*homeassistant_en_de"):
        Dataset("data", "corpora:nothing").source("train")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as http_server:
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()
        thread.join()


def test_a_url_is_a_path(tmp_path: Path, server: str) -> None:
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(json_lines()))
    assert [record for _, record in Dataset("data", f"{server}/pairs.jsonl.gz").records("train")] == ROWS
    with pytest.raises(DataError, match="no such file"):
        Dataset("data", f"{server}/other.jsonl.gz").source("train")


def make_repository(folder: Path) -> None:
    """A Hugging Face data set: two Parquet files of several row groups, and a card that names them."""
    for index in range(2):
        table = pa.Table.from_pylist([{"translation": row} for row in ROWS[index * 25 : index * 25 + 25]])
        pq.write_table(table, folder / f"part-{index}.parquet", row_group_size=5)
    card = "configs:\n- config_name: pairs\n  data_files:\n  - split: train\n    path: part-*.parquet\n"
    (folder / "README.md").write_text(f"---\n{card}---\n# Pairs\n")


def test_a_hub_repository_is_streamed_and_cut_into_row_groups(tmp_path: Path) -> None:
    make_repository(tmp_path)
    data = Dataset("data", str(tmp_path), name="pairs", min_shards=4)
    source = data.source("train")
    assert source.shards[0] == "train-00000-of-00010"
    for shard, offset in ((0, 0), (3, 2), (9, 4), (9, 5)):
        expected = [{"translation": row} for row in ROWS[shard * 5 + offset : shard * 5 + 5]]
        assert list(source.open(shard, offset)) == expected
    data.check("train", ["translation.en"])
    with pytest.raises(DataError, match=r"no column translation.fr; there are translation.en, translation.de"):
        data.check("train", ["translation.fr"])
    with pytest.raises(DataError, match=r"split validation.*train"):
        data.source("validation")
    with pytest.raises(DataError, match=r"data.name=other.*pairs"):
        Dataset("data", str(tmp_path), name="other").source("train")
    with pytest.raises(DataError, match=r"data.path=no/such-set.*neither a local file or folder, nor a data set"):
        Dataset("data", "no/such-set").source("train")


def test_columns_may_be_nested() -> None:
    assert column({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert column({"a": {"b": {"c": 3}}}, "a.b.c") == 3
    for path in ("x", "a.x", "a.b.c.d"):
        with pytest.raises(KeyError):
            column({"a": {"b": {"c": 3}}}, path)


def refused(path: Path, content: bytes, **options: Any) -> str:
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        Dataset("data", str(path), **options).check("train", ["en"])
    return str(caught.value)


def test_files_that_are_not_what_their_names_say_are_refused(tmp_path: Path) -> None:
    assert "is not gzip" in refused(tmp_path / "a.jsonl.gz", json_lines())
    assert "the file is gzip" in refused(tmp_path / "b.jsonl", gzip.compress(json_lines()))
    assert "is not parquet" in refused(tmp_path / "c.parquet", json_lines())
    assert "is not parquet" in refused(tmp_path / "d.parquet", b"")
    assert "PAR1" not in refused(tmp_path / "e.parquet", b"PAR1 and nothing else")
    assert "not JSON" in refused(tmp_path / "f.jsonl", b"en,de\na,b\n")
    assert "JSON list" in refused(tmp_path / "g.json", json.dumps(ROWS).encode())
    assert "no format is known" in refused(tmp_path / "h.dat", json_lines())
    assert "no column en; there are en\tde" in refused(tmp_path / "i.csv", b"en\tde\na\tb\n")


def test_missing_and_empty_data_is_refused_with_what_there_is(tmp_path: Path) -> None:
    assert "split train: empty (a.jsonl)" in refused(tmp_path / "a.jsonl", b"\n\n")
    with pytest.raises(DataError, match=r"missing.jsonl: no such file. .* holds a.jsonl"):
        Dataset("data", str(tmp_path / "missing.jsonl")).source("train")
    with pytest.raises(DataError, match=r"no such file. .* holds a.jsonl"):
        Dataset("data", str(tmp_path / "no" / "such" / "folder" / "*.jsonl")).source("train")
    with pytest.raises(DataError, match=r"has the split train alone. Set data.test to a file, or to null"):
        Dataset("data", str(tmp_path / "a.jsonl")).source("test")
    with pytest.raises(DataError, match=r"data.test is null"):
        Dataset("data", str(tmp_path / "a.jsonl"), test=None).source("test")
    with pytest.raises(DataError, match=r"no split exam; the splits are train, validation, test"):
        Dataset("data", str(tmp_path / "a.jsonl")).source("exam")


def test_options_that_cannot_be_are_all_reported() -> None:
    with pytest.raises(ConfigError) as caught:
        StreamData("x", lanes=0, block=0, format="xml", max_bad_fraction=2)
    assert len(caught.value.problems) == 4


class EvenTask:
    """Takes the records whose number is even."""

    def pieces(self, sample: Encoded) -> list[Encoded]:
        return [sample]

    def encode(self, records: Sequence[Record]) -> list[Encoded | BadRecord]:
        return [
            BadRecord("odd") if record["n"] % 2 else Encoded({"n": np.array([record["n"]])}, 1, 1) for record in records
        ]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("max_samples", [None, 7, 1, 5000])
def test_evaluation_takes_the_first_usable_records_each_once(
    tmp_path: Path, world_size: int, max_samples: int | None
) -> None:
    (tmp_path / "test.jsonl").write_bytes(json_lines([{"n": number} for number in range(2000)]))
    corpus = Corpus(StreamData(str(tmp_path)), {"": EvenTask()})
    ranks = [corpus.evaluation_samples("test", rank, world_size, max_samples) for rank in range(world_size)]
    assert all(sample.index % world_size == rank for rank, samples in enumerate(ranks) for sample in samples)
    everything = sorted((sample.index, sample.record["n"]) for samples in ranks for sample in samples)
    assert everything == [(index, 2 * index) for index in range(min(max_samples or 1000, 1000))]
