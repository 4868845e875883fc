"""Sources made of files: JSON lines, CSV, TSV, text and Parquet, local or by URL, compressed or not."""

from __future__ import annotations

import csv
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from typing import IO, TYPE_CHECKING, Any

import fsspec

from trainer.errors import DataError
from trainer.tasks import BadRecord, Record

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
    ".pq": "parquet",
}
"""Format by suffix; a suffix of COMPRESSIONS may follow it."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}

_MAGIC = {
    "gzip": b"\x1f\x8b",
    "zstd": b"\x28\xb5\x2f\xfd",
    "bz2": b"BZh",
    "xz": b"\xfd7zXZ\x00",
    "parquet": b"PAR1",
}

_UTF8_MARK = b"\xef\xbb\xbf"

csv.field_size_limit(1 << 30)


def file_format(path: str) -> tuple[str | None, str | None]:
    """(format, compression) by the suffixes of `path`; None where there is none or it is unknown."""
    name = path.rsplit("/", 1)[-1].split("?", 1)[0].lower()
    compression = next((kind for suffix, kind in COMPRESSIONS.items() if name.endswith(suffix)), None)
    if compression:
        name = name.rsplit(".", 1)[0]
    return next((kind for suffix, kind in FORMATS.items() if name.endswith(suffix)), None), compression


class FileSource:
    """Files as shards."""

    def __init__(self, paths: Sequence[str], names: Sequence[str], form: str | None = None) -> None:
        """`paths`: what fsspec opens; `names`: what people see; `form`: a value of FORMATS, None = by suffix."""
        self._paths = list(paths)
        self._names = list(names)
        self._form = form

    @property
    def shards(self) -> Sequence[str]:
        """Names of the files."""
        return self._names

    def open(self, shard_index: int, offset: int) -> Iterator[Record | BadRecord]:
        """See `trainer.data.sources.Source`."""
        path, name = self._paths[shard_index], self._names[shard_index]
        kind, compression = file_format(path)
        form = self._form or kind
        if form is None:
            raise DataError(
                f"{path}: no format is known for this suffix; known are {' '.join(FORMATS)}, also with"
                f" {' '.join(COMPRESSIONS)}. Set data.format={'|'.join(dict.fromkeys(FORMATS.values()))}."
            )
        count = offset
        try:
            with fsspec.open(path, "rb") as raw:
                _check_magic(raw, path, form, compression)
            if form == "parquet":
                rows: Iterator[Record | BadRecord] = _parquet(path, offset)
            else:
                rows = _lines(path, form, compression, offset)
            for row in rows:
                yield row
                count += 1
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(
                f"{name}: cannot be read at record {count}: {error or type(error).__name__} ({path})"
            ) from error


def _check_magic(raw: IO[bytes], path: str, form: str, compression: str | None) -> None:
    """Raise DataError where the first bytes contradict the name or the format."""
    head = raw.read(8)
    found = next((kind for kind, magic in _MAGIC.items() if head.startswith(magic)), None)
    expected = "parquet" if form == "parquet" else compression
    if found != expected and (head or form == "parquet"):
        looks = f"is {found}" if found else f"is not {expected}: it begins with {head!r}"
        raise DataError(
            f"{path}: the file {looks}, which is not what its name or data.format says. Rename or replace it."
        )


def _lines(path: str, form: str, compression: str | None, offset: int) -> Iterator[Record | BadRecord]:
    """Records of a file of lines, from record `offset` on."""
    with _decompressed(path, compression) as file:
        if form in ("csv", "tsv"):
            yield from _table(file, "\t" if form == "tsv" else ",", offset)
            return
        parse = _json if form == "jsonl" else _text
        numbered = ((number, line) for number, line in enumerate(file, 1) if not line.isspace())
        for number, line in islice(numbered, offset, None):
            yield parse(number, line.removeprefix(_UTF8_MARK) if number == 1 else line)


@contextmanager
def _decompressed(path: str, compression: str | None) -> Iterator[IO[bytes]]:
    """A file open for reading, decompressed."""
    if compression != "zstd":
        with fsspec.open(path, "rb", compression=compression) as file:
            yield file
        return
    import pyarrow as pa

    # pyarrow reads all frames of a file and reports one cut short; zstandard's reader stops in silence at both
    with fsspec.open(path, "rb") as raw, pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd") as stream:
        yield io.BufferedReader(stream, 1 << 20)


def _json(number: int, line: bytes) -> Record | BadRecord:
    try:
        record = json.loads(line)
    except ValueError as error:
        return BadRecord(f"line {number} is not JSON: {error}")
    if not isinstance(record, dict):
        return BadRecord(f"line {number} is a JSON {type(record).__name__}, not an object")
    return record


def _text(number: int, line: bytes) -> Record | BadRecord:
    try:
        return {"text": line.decode().rstrip("\r\n")}
    except UnicodeDecodeError as error:
        return BadRecord(f"line {number} is not UTF-8: {error}")


def _table(file: IO[bytes], delimiter: str, offset: int) -> Iterator[Record | BadRecord]:
    """Rows of a table with a header; in TSV a quotation mark is a character like any other."""
    with io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as text:
        if delimiter == "\t":
            rows = csv.reader(text, delimiter=delimiter, quoting=csv.QUOTE_NONE)
        else:
            rows = csv.reader(text, delimiter=delimiter)
        header = next(rows, [])
        for row in islice((row for row in rows if row), offset, None):
            if len(row) != len(header):
                yield BadRecord(f"line {rows.line_num} has {len(row)} fields, the header {len(header)}")
            elif not _is_text(row):
                yield BadRecord(f"line {rows.line_num} is not UTF-8")
            else:
                yield dict(zip(header, row, strict=True))


def _is_text(row: list[str]) -> bool:
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet(path: str, offset: int) -> Iterator[Record]:
    """Rows of a Parquet file; row groups before `offset` are not read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with fsspec.open(path, "rb") as file, pq.ParquetFile(file) as parquet:
            first = 0
            while first < parquet.num_row_groups and offset >= parquet.metadata.row_group(first).num_rows:
                offset -= parquet.metadata.row_group(first).num_rows
                first += 1
            if first == parquet.num_row_groups:
                return
            for batch in parquet.iter_batches(1024, row_groups=range(first, parquet.num_row_groups)):
                if offset >= batch.num_rows:
                    offset -= batch.num_rows
                    continue
                yield from _rows(batch.slice(offset))
                offset = 0
    except pa.ArrowException as error:
        raise OSError(str(error)) from error


def _rows(batch: pa.RecordBatch) -> Iterator[Record]:
    """Rows as Python values; lists of numbers as numpy views of the batch."""
    import pyarrow as pa

    def values(array: pa.Array) -> Sequence[Any]:
        kind = array.type
        if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and not array.null_count:
            item, flat = kind.value_type, array.values
            if (pa.types.is_integer(item) or pa.types.is_floating(item)) and not flat.null_count:
                numbers, bounds = flat.to_numpy(zero_copy_only=False), array.offsets.to_pylist()
                return [numbers[begin:end] for begin, end in pairwise(bounds)]
        listed: list[Any] = array.to_pylist()
        return listed

    names = batch.schema.names
    for row in zip(*map(values, batch.columns), strict=True):
        yield dict(zip(names, row, strict=True))
