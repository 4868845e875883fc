"""Formats of files: lines, tables, Parquet, Arrow and tar archives of samples; each is read from any record on."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice, pairwise
from typing import IO, TYPE_CHECKING, Any

import orjson

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
    ".arrow": "arrow",
    ".feather": "arrow",
    ".tar": "tar",
}
"""Format by suffix; a suffix of COMPRESSIONS may follow it."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}

FAULTS = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError)
"""What reading a damaged or unreachable file raises."""

_MAGIC = {
    "gzip": b"\x1f\x8b",
    "zstd": b"\x28\xb5\x2f\xfd",
    "bz2": b"BZh",
    "xz": b"\xfd7zXZ\x00",
    "parquet": b"PAR1",
    "arrow": b"ARROW1",
    "arrow stream": b"\xff\xff\xff\xff",
}

_UTF8_MARK = b"\xef\xbb\xbf"

csv.field_size_limit(1 << 30)


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a file that is a shard.

    begin, end: bytes of lines, row groups of Parquet, record batches of Arrow; None: to the end of the file, of which
    `begin` is then 0. footer: of a Parquet file, where it has been read already.
    """

    path: str
    name: str
    begin: int = 0
    end: int | None = None
    footer: Any = field(default=None, compare=False, repr=False)


def file_format(path: str) -> tuple[str | None, str | None]:
    """(format, compression) by the suffixes of `path`; None where there is none or it is unknown."""
    path = path.split("?", 1)[0] if "://" in path else path  # a query may have slashes of its own
    name = path.rsplit("/", 1)[-1].split("?", 1)[0].lower()
    compression = next((kind for suffix, kind in COMPRESSIONS.items() if name.endswith(suffix)), None)
    if compression:
        name = name.rsplit(".", 1)[0]
    return next((kind for suffix, kind in FORMATS.items() if name.endswith(suffix)), None), compression


def read_part(file: IO[bytes], part: Part, form: str, offset: int, local: bool = False) -> Iterator[Record | BadRecord]:
    """The records of a part from record `offset` on. Raises FAULTS, and DataError where the format is another one.

    file: the part's file, open at its beginning; local: `part.path` is on this machine.
    """
    compression = file_format(part.path)[1]
    if not part.begin:
        _check_magic(file, part.name, form, compression)
    if form == "parquet":
        yield from _parquet(file, part, offset)
    elif form == "arrow":
        yield from _arrow(file, part, offset, local)
    elif form == "tar" and compression is None and local:
        yield from _tar(file, "r:", offset)
    else:
        with _decompressed(file, compression) as plain:
            yield from _tar(plain, "r|", offset) if form == "tar" else _lines(plain, part, form, offset)


def _check_magic(file: IO[bytes], name: str, form: str, compression: str | None) -> None:
    """Raise DataError where the first bytes contradict the name or the format."""
    head = file.read(8)
    file.seek(0)
    found = next((kind for kind, magic in _MAGIC.items() if head.startswith(magic)), None)
    columns = form in ("parquet", "arrow")
    expected = form if columns else compression
    if found == "arrow stream":
        found = "arrow" if form == "arrow" else None
    if found != expected and (head or columns):
        looks = f"is {found}" if found else f"is not {expected}: it begins with {head!r}"
        raise DataError(
            f"{name}: the file {looks}, which is not what its name or data.format says. Rename or replace it."
        )


@contextmanager
def _decompressed(file: IO[bytes], compression: str | None) -> Iterator[IO[bytes]]:
    """What is in a compressed file."""
    if compression is None:
        yield file
    elif compression == "zstd":
        import pyarrow as pa

        # pyarrow reads all frames of a file and reports one cut short; zstandard's reader stops in silence at both
        with pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd") as stream:
            yield io.BufferedReader(stream, 1 << 20)
    else:
        library: Any = {"gzip": gzip, "bz2": bz2, "xz": lzma}[compression]
        with library.open(file, "rb") as plain:
            yield plain


def _lines(file: IO[bytes], part: Part, form: str, offset: int) -> Iterator[Record | BadRecord]:
    """Records of lines, from record `offset` of the part on."""
    if form in ("csv", "tsv"):
        yield from _table(file, "\t" if form == "tsv" else ",", offset)
        return
    parse = _json if form == "jsonl" else _text
    name, first = "line", 1
    numbered: Iterator[tuple[int, bytes]] = enumerate(file, first)
    if part.end is not None:
        name, first = "the line at byte", 0
        numbered = _lines_between(file, part.begin, part.end)
    records = ((number, line) for number, line in numbered if not line.isspace())
    for number, line in islice(records, offset, None):
        yield parse(f"{name} {number}", line.removeprefix(_UTF8_MARK) if number == first else line)


def _lines_between(file: IO[bytes], begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """(first byte, line) of the lines that begin in `begin` <= byte < `end`."""
    place = begin
    if begin:
        file.seek(begin - 1)  # a line that begins at `begin` is preceded by the end of one
        place -= 1
        while place < end:  # in pieces: the line that reaches into this part may be longer than it
            piece = file.readline(1 << 20)
            place += len(piece)
            if not piece or piece.endswith(b"\n"):
                break
    while place < end and (line := file.readline()):
        yield place, line
        place += len(line)


def _json(place: str, line: bytes) -> Record | BadRecord:
    try:
        record = orjson.loads(line)
    except ValueError:  # or what the standard library takes: NaN, large integers, half a surrogate pair
        try:
            record = json.loads(line)
        except ValueError as error:
            return BadRecord(f"{place} is not JSON: {error}")
    if not isinstance(record, dict):
        return BadRecord(f"{place} is a JSON {type(record).__name__}, not an object")
    return record


def _text(place: str, line: bytes) -> Record | BadRecord:
    try:
        return {"text": line.decode().rstrip("\r\n")}
    except UnicodeDecodeError as error:
        return BadRecord(f"{place} is not UTF-8: {error}")


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


def _parquet(file: IO[bytes], part: Part, offset: int) -> Iterator[Record]:
    """Rows of a Parquet file; row groups before `offset` are not read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file, metadata=part.footer) as parquet:
            first, end = part.begin, parquet.num_row_groups if part.end is None else part.end
            while first < end and offset >= parquet.metadata.row_group(first).num_rows:
                offset -= parquet.metadata.row_group(first).num_rows
                first += 1
            for group in range(first, end):  # one by one: pyarrow reads all that it is asked for ahead
                yield from _rows_from(parquet.iter_batches(1024, row_groups=[group]), offset)
                offset = 0
    except pa.ArrowException as error:
        raise OSError(str(error)) from error


def _arrow_batches(file: pa.NativeFile, begin: int) -> Iterator[pa.RecordBatch]:
    """The record batches of an Arrow file, with a footer or as the stream that `datasets` writes, from `begin` on."""
    import pyarrow as pa

    if _has_footer(file):
        reader = pa.ipc.open_file(file)
        return (reader.get_batch(index) for index in range(begin, reader.num_record_batches))
    return islice(pa.ipc.open_stream(file), begin, None)


def num_arrow_batches(path: str) -> int:
    """Record batches of a local Arrow file; their content is not touched. Raises pyarrow.ArrowException or OSError."""
    import pyarrow as pa

    with pa.memory_map(path) as file:
        if _has_footer(file):
            count: int = pa.ipc.open_file(file).num_record_batches
            return count
        return sum(message.type == "record batch" for message in pa.ipc.MessageReader.open_stream(file))


def _has_footer(file: pa.NativeFile) -> bool:
    head: bytes = file.read(6)
    file.seek(0)
    return head == _MAGIC["arrow"]


def _arrow(file: IO[bytes], part: Part, offset: int, local: bool) -> Iterator[Record]:
    """Rows of an Arrow file; batches before `offset` are skipped, unread where the file is mapped into memory."""
    import pyarrow as pa

    count = None if part.end is None else part.end - part.begin
    try:
        with pa.memory_map(part.path) if local else pa.PythonFile(file, "r") as mapped:
            yield from _rows_from(islice(_arrow_batches(mapped, part.begin), count), offset)
    except pa.ArrowException as error:
        raise OSError(str(error)) from error


def _rows_from(batches: Iterator[pa.RecordBatch], offset: int) -> Iterator[Record]:
    """The rows of batches from row `offset` on."""
    for batch in batches:
        if offset >= batch.num_rows:
            offset -= batch.num_rows
            continue
        yield from _rows(batch.slice(offset))
        offset = 0


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


class _Member(tarfile.TarInfo):
    """A member of an archive; where the archive breaks off, tarfile itself would take it for the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the end mark
                raise
            raise tarfile.ReadError(f"cut short or damaged at byte {archive.offset}: {error}") from error


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(sample, extension, member) of the files; what has no name or no extension belongs to no sample."""
    while (member := archive.next()) is not None:
        vars(archive)["members"] = []  # tarfile would keep them all
        named = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]+)", member.name)
        if member.isfile() and named:
            yield named[1], named[2].lower(), member


def _tar(file: IO[bytes], mode: Any, offset: int) -> Iterator[Record | BadRecord]:
    """Samples of an archive: neighbouring members whose names are the same up to the first dot of the file name."""
    with tarfile.open(fileobj=file, mode=mode, tarinfo=_Member) as archive:
        samples = groupby(_members(archive), key=lambda entry: entry[0])
        for key, entries in islice(samples, offset, None):
            record: dict[str, Any] = {"__key__": key}
            bad: BadRecord | None = None
            for _, extension, member in entries:
                content = archive.extractfile(member)
                assert content is not None, "a file has content"
                try:
                    if extension in record:
                        raise ValueError("it is there twice")
                    record[extension] = _value(extension, content.read())
                except ValueError as error:
                    bad = bad or BadRecord(f"{member.name}: {error}")
            yield bad or record


def _value(extension: str, content: bytes) -> Any:
    """What a member holds, by its extension. Raises ValueError where it does not hold it."""
    kind = extension.rsplit(".", 1)[-1]
    if kind == "json":
        return json.loads(content)
    if kind in ("txt", "text"):
        return content.decode()
    if kind == "cls":
        return int(content)
    return content
