"""Find whole checkpoints, and read from them exactly the ranges that a rank needs."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trainer import distributed
from trainer.build import fits
from trainer.checkpoint import SEPARATOR, is_step_name, step_name
from trainer.checkpoint.parse import MANIFEST, STATE, parse_manifest, parse_state
from trainer.engine.base import Engine
from trainer.errors import CheckpointError
from trainer.state import TrainState

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint: its folder and what its manifest and state say."""

    folder: Path
    manifest: Mapping[str, Any]
    state: TrainState
    scalars: Mapping[str, float]
    lanes: Mapping[int, Mapping[str, Any]]


def _ignore() -> None:
    """Nothing."""


def newest(root: Path, progress: Callable[[], None] = _ignore) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None where there is none. progress: see `read`.

    Raises CheckpointError naming the damage when there are checkpoints but none is whole: starting from zero in silence
    would throw a run away.
    """
    folders = sorted((path for path in root.glob("step_*") if path.is_dir() and is_step_name(path.name)), reverse=True)
    damage = []
    for folder in folders:
        try:
            return read(folder, progress)
        except CheckpointError as error:
            damage.append(str(error))
            _log.warning("%s Looking for an older checkpoint.", error)
    if damage:
        raise CheckpointError(
            "\n".join([*damage, f"No whole checkpoint is left in {root}; restore one or start another run name."])
        )
    return None


def set_aside(root: Path, step: int) -> None:
    """Rename checkpoints newer than the one of `step`, which are damaged, so that the run can save these steps anew."""
    for folder in root.glob("step_*"):
        if is_step_name(folder.name) and folder.name > step_name(step):
            aside = folder.with_name(f".damaged_{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            _log.warning("The damaged checkpoint %s is now %s", folder, folder.rename(aside).name)


def find(root: Path, which: str) -> Checkpoint:
    """The checkpoint named by `which`: "latest", "best", a step number, or a folder's name.

    Raises CheckpointError listing what exists.
    """
    pointer = root / which
    if which in ("latest", "best"):
        name = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else which
    else:
        name = step_name(int(which)) if which.isdigit() else which
    gone = not pointer.is_file() or (is_step_name(name) and not (root / name).is_dir())  # damaged, and set aside
    if which == "latest" and gone and (checkpoint := newest(root)) is not None:
        return checkpoint
    if not is_step_name(name) or not (root / name).is_dir():
        existing = ", ".join(sorted(path.name for path in root.glob("step_*"))) or "none"
        raise CheckpointError(f"checkpoint={which} does not exist in {root}; there are: {existing}.")
    return read(root / name)


def read(folder: Path, progress: Callable[[], None] = _ignore) -> Checkpoint:
    """Read and verify a checkpoint's manifest, the presence, size and SHA-256 of its files.

    progress: called for each file; terabytes take long, and are no hang. Raises CheckpointError naming the file that is
    missing or damaged.
    """
    manifest = parse_manifest(_own(folder / MANIFEST).read_bytes(), str(folder / MANIFEST))
    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as threads:  # hashing lets go of the interpreter
        names = manifest["files"]
        for _ in threads.map(lambda name: _check_file(folder / name, names[name]), names):
            progress()
    return Checkpoint(folder, manifest, *parse_state((folder / STATE).read_bytes(), str(folder / STATE)))


def _check_file(path: Path, facts: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a file is not as its manifest says."""
    num_bytes = facts["bytes"]
    if _own(path).stat().st_size != num_bytes:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, its manifest says {num_bytes}; it is damaged.")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
            raise CheckpointError(f"{path} does not match the SHA-256 in its manifest; it is damaged.")


def _own(path: Path) -> Path:
    """`path`, if it is a file that lies where it seems to. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; the checkpoint is not whole.")
    if path.resolve().parent != path.parent.resolve():
        raise CheckpointError(f"{path} is a link to a file elsewhere; put the file itself there.")
    return path


Columns = tuple[int, int] | None
"""See `Fragment.columns`."""

_READERS = 16
"""Threads that read files to be checked."""

_BLOCK = 1 << 20
"""Elements that are moved at once where columns differ: their places cost eight bytes each."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A tensor of a shard: elements [start, start + numel) of a state's `columns`."""

    start: int
    numel: int
    columns: Columns
    key: str
    file: Any


class Reader:
    """Reads ranges of flattened states out of a checkpoint's shards, whoever wrote them."""

    def __init__(self, checkpoint: Checkpoint, place: float | None = None) -> None:
        """place: where this rank stands among all, from 0 to 1. Shards are then opened when they are needed, first
        what the rank in this place wrote, which is all that a job of the same shape asks for: opening all on every
        rank takes as many files as there are ranks, squared. None: all are opened at once, and `shapes` has all."""
        self._checkpoint = checkpoint
        self._files = ExitStack()
        self._pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)
        self.shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        shards = sorted(name for name in checkpoint.manifest["files"] if name.endswith(".safetensors"))
        first = int((place or 0.0) * len(shards))
        self._unopened = [shards[index] for index in sorted(range(len(shards)), key=lambda one: -abs(one - first))]
        self._lazy = place is not None

    def __enter__(self) -> Reader:
        while not self._lazy and self._open_next():
            pass
        return self

    def shape(self, parameter: str, state: str) -> tuple[int, ...] | None:
        """Of a whole state; None where no shard has it."""
        while (parameter, state) not in self.shapes and self._open_next():
            pass
        return self.shapes.get((parameter, state))

    def _open_next(self) -> bool:
        """Take in what one more shard holds, if there is one. Raises CheckpointError where it is none."""
        if not self._unopened:
            return False
        path = self._checkpoint.folder / self._unopened.pop()
        try:
            self._open(path)
        except (SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
            self._files.close()
            raise CheckpointError(f"{path} holds no tensors as a save writes them ({error}); it is damaged.") from None
        return True

    def _open(self, path: Path) -> None:
        """`_open_next`, with the errors of what reads the shard."""
        # A mapped file counts as memory of the process, all of it that was read.
        file = self._files.enter_context(safe_open(path, framework="pt", backend="pread"))
        for whole, written in (file.metadata() or {}).items():
            parameter, state = whole.split(SEPARATOR)
            shape = json.loads(written)
            if not fits(shape, list[int]) or min(shape, default=0) < 0:
                raise ValueError(f"{written[:100]} is no shape")
            self.shapes[parameter, state] = tuple(shape)
        for key in file.keys():  # noqa: SIM118 - not a mapping
            parameter, state, start, *interval = key.split(SEPARATOR)
            columns = tuple(map(int, interval[0].split(":"))) if interval else None
            (numel,) = file.get_slice(key).get_shape()
            piece = _Piece(int(start), numel, columns, key, file)  # type: ignore[arg-type]
            _check(self.shapes[parameter, state], piece)
            self._pieces[parameter, state].append(piece)

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def read_into(self, parameter: str, state: str, start: int, target: torch.Tensor, columns: Columns = None) -> None:
        """Fill the flat `target` with elements [start, start + numel) of a state's `columns`, from as many shards as it
        takes.

        Raises CheckpointError when the checkpoint does not hold them all.
        """
        filled, pieces = 0, self._pieces[parameter, state]
        for number in itertools.count():
            while number == len(pieces) and filled < target.numel() and self._open_next():
                pass
            if number == len(pieces):
                break
            filled += self._read_piece(pieces[number], self.shapes[parameter, state], start, target, columns)
        if filled < target.numel():
            raise self._lacks(parameter, state, filled, target.numel(), start)

    @staticmethod
    def _read_piece(piece: _Piece, shape: tuple[int, ...], start: int, target: torch.Tensor, columns: Columns) -> int:
        """`read_into` from one piece of a state of `shape`; returns how many elements."""
        if piece.columns != columns:
            return _read_across(piece, shape[1], start, target, columns)
        begin, stop = max(start, piece.start), min(start + target.numel(), piece.start + piece.numel)
        if begin < stop:
            part = piece.file.get_slice(piece.key)[begin - piece.start : stop - piece.start]
            target[begin - start : stop - start].copy_(part)
        return max(0, stop - begin)

    def _lacks(self, parameter: str, state: str, found: int, wanted: int, start: int) -> CheckpointError:
        return CheckpointError(
            f"{self._checkpoint.folder}: {parameter} ({state}) has {found} of the {wanted} elements wanted from"
            f" {start}; the checkpoint was written by another model or optimizer."
        )

    def check_held(self, parameter: str, state: str) -> None:
        """Raise CheckpointError when the checkpoint has fewer elements of a state than its shape says."""
        numel = math.prod(self.shapes.get((parameter, state), ()))
        held = sum(piece.numel for piece in self._pieces[parameter, state])
        if held < numel:
            raise self._lacks(parameter, state, held, numel, 0)

    def whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter's master weights, one at a time, fp32."""
        for (parameter, state), shape in self.shapes.items():
            if state == "master":
                self.check_held(parameter, state)  # before memory is asked for, whatever the shape says
                target = torch.empty(math.prod(shape))
                self.read_into(parameter, state, 0, target)
                yield parameter, target.view(shape)


def _check(shape: tuple[int, ...], piece: _Piece) -> None:
    """Raise ValueError where a piece cannot be a part of a state of this shape."""
    begin, end = piece.columns or (0, 1)
    if piece.start < 0 or not 0 <= begin < end or (piece.columns and (len(shape) != 2 or end > shape[1])):
        raise ValueError(f"{piece.key} is no part of a tensor of shape {shape}")


def _read_across(piece: _Piece, width: int, start: int, target: torch.Tensor, columns: Columns) -> int:
    """`read_into` from a piece of other columns of a matrix, `width` columns wide; returns how many elements."""
    own_begin, own_end = piece.columns or (0, width)
    begin, end = columns or (0, width)
    own_width, wanted_width = own_end - own_begin, end - begin
    first = max(piece.start, start // wanted_width * own_width)
    rows = -(-(start + target.numel()) // wanted_width)
    last = min(piece.start + piece.numel, rows * own_width)
    filled = 0
    for low in range(first, last, _BLOCK) if max(own_begin, begin) < min(own_end, end) else ():
        high = min(low + _BLOCK, last)
        index = torch.arange(low, high)
        column = index % own_width + own_begin
        place = index // own_width * wanted_width + column - begin - start
        found = (column >= begin) & (column < end) & (place >= 0) & (place < target.numel())
        values = piece.file.get_slice(piece.key)[low - piece.start : high - piece.start][found]
        target[place[found].to(target.device)] = values.to(target)
        filled += len(values)
    return filled


def load(checkpoint: Checkpoint, engine: Engine) -> None:
    """Put a checkpoint's weights and optimizer states into an engine of any kind, on any number of ranks.

    Raises CheckpointError listing parameters that differ in name or shape.
    """
    with Reader(checkpoint, distributed.rank() / distributed.world_size()) as reader:
        problems = []
        for fragment in engine.fragments():
            shape = reader.shape(fragment.parameter, fragment.key)
            if shape is None:
                problems.append(f"{fragment.parameter} ({fragment.key}) is not in the checkpoint")
            elif shape != fragment.shape:
                problems.append(
                    f"{fragment.parameter} ({fragment.key}): {shape} in the checkpoint, {fragment.shape} in the model"
                )
        if problems:
            raise CheckpointError(f"{checkpoint.folder} does not fit this model:\n  " + "\n  ".join(problems))
        for fragment in engine.fragments():
            reader.read_into(fragment.parameter, fragment.key, fragment.start, fragment.tensor, fragment.columns)
    engine.after_load(checkpoint.scalars)
