"""From a path and a split to the files that hold it, and clear words where there are none."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.data.formats import file_format
from trainer.data.remote import filesystem as open_filesystem
from trainer.data.remote import retrying
from trainer.errors import DataError, redacted

_PACKAGED = "corpora:"
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def expand(path: str) -> str:
    """`path` with `~` and `corpora:NAME` (a corpus that comes with this package) resolved."""
    if not path.startswith(_PACKAGED):
        return str(Path(path).expanduser()) if path.startswith("~") else path
    root = importlib.resources.files("trainer.data") / "corpora"
    folder = root / path.removeprefix(_PACKAGED)
    if not folder.is_dir():
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
        raise DataError(f"data.path={path}: no such packaged corpus; there are {_listed(names)}.")
    return str(folder)


def is_hub(path: str) -> bool:
    """Whether `path` (expanded) names a Hugging Face data set: a local repository of one, or a name that is no file."""
    local = Path(path)
    if local.is_dir():
        card = local / "README.md"
        head = card.read_text(errors="replace").split("\n---", 1)[0] if card.is_file() else ""
        described = head.startswith("---") and re.search(r"^(configs|dataset_info):", head, re.MULTILINE)
        return bool(described) or (local / "dataset_infos.json").is_file()
    return not local.exists() and _HUB_NAME.fullmatch(path) is not None and file_format(path) == (None, None)


def find_files(path: str, split: str, value: str, form: str | None) -> tuple[list[str], list[str]]:
    """(paths for fsspec, names for people) of a split's files, sorted.

    path: expanded file, glob, folder or URL; split: train, validation or test; value: of `data.<split>`, a name or
    glob.
    A folder's split is the files whose name begins with `value` or that lie in a folder named so; a single file or glob
    is the train split, and the others are then paths of their own. Raises DataError listing what there is instead, or
    saying why a server cannot be asked; SetupError where a package for its protocol is missing.
    """
    try:
        return _find_files(path, split, value, form)
    except OSError as error:
        raise DataError(f"data.path={redacted(path)}, split {split}: cannot be read: {error}") from error


def _find_files(path: str, split: str, value: str, form: str | None) -> tuple[list[str], list[str]]:
    filesystem, root = open_filesystem(path)
    if not _is_folder(filesystem, root):
        if value != split:  # a file or glob of its own
            path = expand(value)
            filesystem, root = open_filesystem(path)
        elif split != "train":
            raise DataError(
                f"data.path={redacted(path)} is not a folder, so it has the split train alone."
                f" Set data.{split} to a file, or to null to go without."
            )
        found = _glob(filesystem, root)
        if not found:
            key = "path" if value == split else split
            raise DataError(f"data.{key}={redacted(path)}: no such file. {_beside(filesystem, root)}")
        return _with_names(filesystem, found, root.split("?", 1)[0].rsplit("/", 1)[0])
    all_files = retrying(lambda: filesystem.find(root), path)
    below = {name: name[len(root.rstrip("/")) + 1 :] for name in sorted(all_files)}
    data = [name for name, short in below.items() if _is_data(short, form)]
    if _is_pattern(value) or file_format(value)[0]:
        found = _glob(filesystem, f"{root.rstrip('/')}/{value}")
    else:
        found = [name for name in data if any(part.startswith(value) for part in _split_parts(below[name], value))]
    if not found:
        there = [below[name] for name in data] or list(below.values())
        raise DataError(
            f"data.path={redacted(path)} has no files for data.{split}={value}; it holds {_listed(there)}."
            f" Set data.{split} to one of the names or to a glob, or to null to go without."
        )
    return _with_names(filesystem, found, root)


def _split_parts(short: str, value: str) -> list[str]:
    """What may name the split in a relative path: the file's own name, or a folder that is exactly `value`."""
    *folders, name = short.split("/")
    return [name, *(folder for folder in folders if folder == value)]


def _is_pattern(path: str) -> bool:
    return any(mark in path for mark in "*[") or ("?" in path and "://" not in path)


def _is_folder(filesystem: Any, root: str) -> bool:
    if root.startswith("http"):  # asking a web server would fetch the file
        return root.endswith("/")
    if _is_pattern(root):
        return False
    try:
        return bool(retrying(lambda: filesystem.info(root)["type"], root) == "directory")
    except FileNotFoundError:
        return False


def _is_data(short: str, form: str | None) -> bool:
    hidden = any(part.startswith((".", "_")) for part in short.split("/"))
    return not hidden and (form is not None or file_format(short)[0] is not None)


def _glob(filesystem: Any, pattern: str) -> list[str]:
    if _is_pattern(pattern):
        found = retrying(lambda: filesystem.glob(pattern, detail=True), pattern)
        return sorted(name for name, info in found.items() if info["type"] != "directory")
    try:
        retrying(lambda: filesystem.info(pattern), pattern)  # `exists` takes a server in trouble for a missing file
    except FileNotFoundError:
        return []
    return [pattern]


def _with_names(filesystem: Any, found: Sequence[str], root: str) -> tuple[list[str], list[str]]:
    prefix = root.split("*", 1)[0].rstrip("/") + "/"
    local = "file" in filesystem.protocol
    paths = [name if local else filesystem.unstrip_protocol(name) for name in found]
    return paths, [redacted(name).removeprefix(redacted(prefix)) for name in found]


def _beside(filesystem: Any, root: str) -> str:
    """What lies in the nearest folder that exists; web servers have no folders."""
    folder = "" if root.startswith("http") else root
    while "/" in folder.rstrip("/"):
        folder = folder.rstrip("/").rsplit("/", 1)[0]
        if _is_folder(filesystem, folder or "/"):
            names = sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in filesystem.ls(folder or "/", detail=False))
            return f"{folder or '/'} holds {_listed(names)}."
    return ""


def _listed(names: Iterable[str], limit: int = 12) -> str:
    names = list(names)
    shown = ", ".join(names[:limit]) or "nothing"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
