"""Sources made of files: JSON lines, CSV, TSV, text, Parquet, Arrow and tar, local or by URL, compressed or not.

Few files still make many shards: they are cut into parts, which are a function of the files and `min_shards` alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from trainer.data.formats import COMPRESSIONS, FAULTS, FORMATS, Part, file_format, num_arrow_batches, read_part
from trainer.data.remote import Retries, filesystem, has_ranges, is_remote, open_file, retrying
from trainer.errors import DataError, redacted
from trainer.tasks import BadRecord, Record

__all__ = ["COMPRESSIONS", "FORMATS", "FileSource", "file_format"]

_TELL = 4
"""A file that cannot be cut and is smaller than so many of the smallest parts costs little: nobody need be told."""

RANGES = 8
"""Ranges for each shard that is wanted: a resume reads a range up to its place."""

SMALLEST, LARGEST = 256 << 10, 16 << 20
"""Bytes of a part of a file of lines; a resume scans no more than the largest, and cutting finer gains nothing."""

_FEW = 8
"""Fewer files than this in a folder on a server are asked for their sizes one by one, more of them by a listing."""

_CUT = ("jsonl", "text", "parquet", "arrow")


class FileSource:
    """Files, or parts of them, as shards."""

    def __init__(
        self,
        paths: Sequence[str],
        names: Sequence[str],
        form: str | None = None,
        min_shards: int = 1,
        retries: Retries | None = None,
    ) -> None:
        """Files fewer than `min_shards` are cut into parts where that can be.

        paths: what fsspec opens; names: what people see; form: a value of FORMATS, None = by suffix; retries: how long
        faults of servers are waited out, None = as `set_retries` says. Raises DataError where a server cannot be asked.
        """
        self._form = form
        self._retries = retries
        self._parts, self._uncut = _cut_files(paths, names, form, min_shards, retries)
        self._names = [part.name for part in self._parts]

    @property
    def shards(self) -> Sequence[str]:
        """Names of the files; of a part, with `@` and where it begins (`x.jsonl@1048576`, `x.parquet@row_group_3`)."""
        return self._names

    @property
    def uncut(self) -> str | None:
        """Why there are fewer shards than asked for, naming the first large file that stays whole; None if not so."""
        return self._uncut

    def open(self, shard_index: int, offset: int) -> Iterator[Record | BadRecord]:
        """See `trainer.data.sources.Source`."""
        part = self._parts[shard_index]
        form = self._form or file_format(part.path)[0]
        if form is None:
            raise DataError(
                f"{redacted(part.path)}: no format is known for this suffix; known are {' '.join(FORMATS)}, also with"
                f" {' '.join(COMPRESSIONS)}. Set data.format={'|'.join(dict.fromkeys(FORMATS.values()))}."
            )
        count = offset
        try:
            with open_file(part.path, self._retries) as file:
                for row in read_part(file, part, form, offset, local=not is_remote(part.path)):
                    yield row
                    count += 1
        except FAULTS as error:
            words = str(error) or type(error).__name__
            raise DataError(
                f"{part.name}: cannot be read at record {count}: {words} ({redacted(part.path)})"
            ) from error


def _cut_files(
    paths: Sequence[str], names: Sequence[str], form: str | None, min_shards: int, retries: Retries | None
) -> tuple[list[Part], str | None]:
    """(parts in the order of the files, what kept the parts fewer than `min_shards`).

    With at least `min_shards` files, only lines longer than LARGEST are cut, where sizes are to be had without asking
    for every file. With fewer, sizes and footers are read. Raises DataError where a server does not let them.
    """
    few = len(paths) < min_shards
    kinds = [form or file_format(path)[0] for path in paths]
    candidates = [
        path for path, kind in zip(paths, kinds, strict=True) if few or (kind in ("jsonl", "text") and _is_plain(path))
    ]
    sizes = _sizes(candidates, few, retries)
    step = min(max(sum(sizes.values()) // (RANGES * min_shards), SMALLEST), LARGEST) if few else LARGEST
    parts: list[Part] = []
    reasons: list[str] = []
    for path, name, kind in zip(paths, names, kinds, strict=True):
        size = sizes.get(path)
        reason = _uncut_because(path, kind, retries) if size is not None and size > step else None
        if size is None or reason or (kind != "parquet" and size <= step):
            cuts = [Part(path, name)]
        elif kind == "parquet":
            cuts = list(_row_groups(path, name, retries))
        elif kind == "arrow":
            cuts = list(_record_batches(path, name, size, step))
        else:
            cuts = [Part(path, f"{name}@{begin}", begin, min(begin + step, size)) for begin in range(0, size, step)]
        parts += cuts
        if size is not None and len(cuts) * step < size and size > _TELL * SMALLEST:
            pieces = "row groups" if kind == "parquet" else "record batches"
            reasons.append(f"{name} {reason or f'has no finer pieces than its {pieces}'}")
    return parts, reasons[0] if reasons and len(parts) < min_shards else None


def _is_plain(path: str) -> bool:
    return file_format(path)[1] is None and "::" not in path


def _uncut_because(path: str, kind: str | None, retries: Retries | None) -> str | None:
    """Why a file stays whole, to be read after its name; None where it can be cut."""
    if file_format(path)[1]:
        return "is compressed, so it cannot be split"
    if kind not in _CUT:
        what = {"csv": "CSV", "tsv": "TSV", "tar": "a tar archive"}.get(kind or "", "of no known format")
        return f"is {what}, which cannot be split"
    if "::" in path:
        return "lies inside another file or cache, so it cannot be split"
    if kind == "arrow" and is_remote(path):
        return "is an Arrow file on a server, which is not split"
    with _naming(path):
        if path.startswith("http") and not has_ranges(path, retries):
            return "comes from a server that cannot send a part of a file, so it cannot be split"
    return None


def _sizes(paths: Sequence[str], few: bool, retries: Retries | None) -> dict[str, int]:
    """Bytes of the files; those that are missing or of unknown size are left out. One listing for many on a server."""
    sizes: dict[str, int | None] = {}
    folders: dict[str, list[str]] = {}
    for path in paths:
        if is_remote(path):
            folders.setdefault(path.rsplit("/", 1)[0] + "/", []).append(path)
        else:
            sizes[path] = os.path.getsize(path) if os.path.isfile(path) else None
    for folder, inside in folders.items():
        if few or len(inside) < _FEW:
            sizes |= {path: _size(path, retries) for path in inside}
        elif not folder.startswith("http"):  # a page of links tells no sizes
            found, name = filesystem(folder, retries)
            with _naming(folder):
                entries = retrying(partial(found.ls, name, detail=True), folder, retries)
            listed = {entry["name"]: entry.get("size") for entry in entries}
            sizes |= {path: listed.get(found._strip_protocol(path)) for path in inside}
    return {path: size for path, size in sizes.items() if size is not None}


def _size(path: str, retries: Retries | None) -> int | None:
    found, name = filesystem(path, retries)
    with _naming(path):
        try:
            size: int | None = retrying(lambda: found.info(name).get("size"), path, retries)
        except FileNotFoundError:  # told when it is opened
            return None
    return size


def _row_groups(path: str, name: str, retries: Retries | None) -> list[Part]:
    """A part for each row group; the whole file where there are not two, or where it is damaged (opening it tells)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _naming(path):
        try:
            with open_file(path, retries) as file:
                footer = pq.read_metadata(file)
        except pa.ArrowException:
            return [Part(path, name)]
    if footer.num_row_groups < 2:
        return [Part(path, name)]
    return [Part(path, f"{name}@row_group_{index}", index, index + 1, footer) for index in range(footer.num_row_groups)]


def _record_batches(path: str, name: str, size: int, step: int) -> list[Part]:
    """Parts of about `step` bytes; the whole file as for row groups."""
    import pyarrow as pa

    with _naming(path):
        try:
            count = num_arrow_batches(path)
        except pa.ArrowException:
            return [Part(path, name)]
    every = max(1, count * step // size)
    if every >= count:
        return [Part(path, name)]
    return [Part(path, f"{name}@batch_{begin}", begin, min(begin + every, count)) for begin in range(0, count, every)]


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Faults as a DataError that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{redacted(path)}: cannot be read: {error}") from error
