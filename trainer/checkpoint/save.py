"""Write a checkpoint so that it is whole or absent, while training goes on.

Saving has three parts. The *snapshot* notes what this rank's fragments are. The *write* brings them to the disk in a
thread: from where they are, beside the forward and backward pass that follow, for nothing but the next update changes
them; what is not written when that comes is copied first. Off the host (on a GPU) all is copied first. The *commit*,
when every rank has written, adds the manifest and renames.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer import distributed
from trainer.checkpoint import FORMAT, SEPARATOR, is_step_name, kept, step_name
from trainer.checkpoint.pieces import write_pieces
from trainer.config import CheckpointConfig
from trainer.engine.base import Engine, Fragment
from trainer.errors import CheckpointError
from trainer.guards import watchdog
from trainer.state import TrainState

if TYPE_CHECKING:
    from trainer.checkpoint.copies import Copier

_NICENESS = 10
"""Of the thread that writes: what it takes from the step is less than what it would take as an equal."""


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A rank's part of the run as it stood after a step; `tensors`: by their keys in the file, copies or what is still
    to be copied, or stand-ins on the meta device for what training leaves alone until it is written."""

    state: TrainState
    lanes: Mapping[int, Any]
    scalars: Mapping[str, float]
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]
    shapes: Mapping[str, list[int]]


@dataclass(frozen=True, slots=True)
class _Shard:
    """What a rank tells the others about the file it wrote; `failure`: why there is none."""

    name: str
    num_bytes: int
    sha256: str
    shapes: Mapping[str, list[int]]
    lanes: Mapping[int, Any]
    failure: str | None = None


class Checkpointer:
    """The checkpoints of a run. Methods are called by all ranks together, but for `written`."""

    def __init__(
        self,
        root: Path,
        engine: Engine,
        plan: Mapping[str, Any],
        checkpoint: CheckpointConfig,
        told: Callable[[int, str | None], None],
        copier: Copier | None = None,
    ) -> None:
        """root: the run's `checkpoints` folder; told: on rank 0, the step of a checkpoint and why it was not written,
        or None; copier: on rank 0 of a run with `checkpoint.remote`, for what it is also told of copies."""
        self._root = root
        self._engine = engine
        self._plan = plan
        self.checkpoint = checkpoint
        self._told = told
        self._copier = copier
        self._step = 0
        """The last that was to be saved."""
        self._snapshot: _Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        """Nothing of the snapshot is left that an update may change."""
        self._copied.set()
        self._awaited = threading.Event()
        """An update waits."""
        self._best = False
        self.failure: str | None = None
        """Why the last commit gave no checkpoint."""
        self._shard = _Shard("", 0, "", {}, {}, "nothing was written")

    @property
    def written(self) -> bool:
        """Whether nothing keeps this rank from a commit: there is a snapshot, and it is on the disk."""
        return self._snapshot is not None and not (self._thread is not None and self._thread.is_alive())

    def save(self, state: TrainState, lanes: Mapping[int, Any], best: bool = False) -> None:
        """Begin to save the run as it stands after `state.step`; one save at a time, so another is finished first.

        lanes: positions of this rank's data lanes; best: it is the best so far.
        """
        self._step = state.step
        if self._snapshot is not None and self._snapshot.state.step == state.step:
            self._best = self._best or best
            return
        self.finish()
        final = self._root / step_name(state.step)
        if not final.exists():
            if (problem := distributed.on_rank_zero(lambda: _fresh(self._partial(state.step)))) is not None:
                self._conclude(state.step, [problem])
                return
            self._best = best
            self._snapshot = _take_snapshot(self._engine, state, lanes, self.checkpoint.asynchronous)
            self._copied.clear()
            self._awaited.clear()
            self._thread = threading.Thread(target=self._write, args=(self._snapshot,), name="checkpoint")
            self._thread.start()
            if not self.checkpoint.asynchronous:
                self.finish()
        elif best:  # the same step of the same run: whole, so nothing to add
            distributed.on_rank_zero(lambda: point(self._root, "best", final.name))

    def settle(self) -> None:
        """Wait until the next update may change what is saved; before every update."""
        self._awaited.set()
        self._copied.wait()

    def commit(self) -> None:
        """Make the checkpoint that every rank has written valid. One that failed is told, and the run goes on."""
        assert self._snapshot is not None and self._thread is not None, "nothing was begun"
        self._thread.join()
        snapshot, self._snapshot = self._snapshot, None
        shards = distributed.gather_objects(self._shard)
        self._conclude(snapshot.state.step, distributed.on_rank_zero(lambda: self._publish(snapshot, shards)))

    def _conclude(self, step: int, failures: list[str]) -> None:
        self.failure = f"the checkpoint of step {step} was not written: {'; '.join(failures)}" if failures else None
        if distributed.rank() == 0:
            self._told(step, self.failure)
            if self._copier is not None:
                self._tell_copies(self._copier, step)

    def _tell_copies(self, copier: Copier, step: int, last: bool = False) -> None:
        for news in copier.take_news(last):
            self._told(step, news)

    def finish(self) -> None:
        """Wait for a save that is under way, and commit it."""
        if self._snapshot is not None:
            self.commit()

    def require(self) -> None:
        """`finish`, and raise CheckpointError where the last checkpoint could not be written."""
        self.finish()
        if self.checkpoint.remote is not None:
            self._await_copies()
        if self.failure is not None:
            raise CheckpointError(
                f"{self._root}: {self.failure}. The checkpoint before it is valid; make room or mend the storage, then"
                " start the run again."
            )

    def _await_copies(self) -> None:
        """Wait until the last checkpoint is on remote storage or cannot be brought there. All ranks wait: a launcher
        may end those that are left when one ends."""
        before = None
        while (now := distributed.on_rank_zero(self._wait)) is not None:
            if now != before:
                watchdog.progress()
            before = now
        if self._copier is not None:
            self._tell_copies(self._copier, self._step, last=True)
            with suppress(OSError):  # the next save deletes them
                self._prune()

    def _wait(self) -> int | None:
        assert self._copier is not None, "rank 0 has a copier where checkpoint.remote is set"
        return self._copier.wait(1.0)

    def _prune(self) -> None:
        spared = frozenset() if self._copier is None else self._copier.spared
        prune(self._root, self.checkpoint.keep, self.checkpoint.keep_every, spared)

    def _partial(self, step: int) -> Path:
        return self._root / f".partial_{step_name(step)}"

    def _write(self, snapshot: _Snapshot) -> None:
        """In the thread: this rank's file."""
        path = self._partial(snapshot.state.step) / f"shard_{distributed.rank():05d}.safetensors"
        sizes = {key: tensor.numel() for key, tensor in snapshot.tensors.items()}
        try:
            if self.checkpoint.asynchronous:
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
                pieces = self._pieces(dict(snapshot.tensors))
            else:
                pieces = ((key, fragment.tensor) for key, fragment in _saved(self._engine))
            write_pieces(path, sizes, pieces, snapshot.metadata)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            self._shard = _Shard(path.name, path.stat().st_size, _sha256(path), snapshot.shapes, snapshot.lanes)
        except Exception as error:  # a full disk must not end the run; the commit tells
            self._shard = _Shard("", 0, "", {}, {}, failure=str(error) or type(error).__name__)
        finally:
            self._copied.set()

    def _pieces(self, left: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """What to write, in order; each is let go of when the next is asked for."""
        if self._engine.fragments_stay:
            on_host = all(tensor.device.type == "cpu" for tensor in left.values())
            while left and on_host and not self._awaited.is_set():
                key = next(iter(left))
                yield key, left.pop(key)
            left = {key: _copy(tensor) for key, tensor in left.items()}
        self._copied.set()
        while left:
            key = next(iter(left))
            yield key, left.pop(key)

    def _publish(self, snapshot: _Snapshot, shards: list[_Shard]) -> list[str]:
        """On rank 0: state, manifest, rename, pointers, and what need not be kept; returns what went wrong."""
        step = snapshot.state.step
        failures = [f"rank {rank}: {one.failure}" for rank, one in enumerate(shards) if one.failure is not None]
        if failures:
            shutil.rmtree(self._partial(step), ignore_errors=True)
            return failures
        try:
            _seal(self._partial(step), snapshot, shards, self._plan)
            self._partial(step).rename(self._root / step_name(step))
            point(self._root, "latest", step_name(step))
            if self._best:
                point(self._root, "best", step_name(step))
            if self._copier is not None:  # first: what it is offered is spared
                self._copier.offer()
            self._prune()
        except OSError as error:
            shutil.rmtree(self._partial(step), ignore_errors=True)
            return [f"rank 0: {error}"]
        return []


def _saved(engine: Engine) -> Iterator[tuple[str, Fragment]]:
    """The fragments that this rank saves, with their keys in the file."""
    for fragment in engine.fragments():
        if fragment.saved:
            columns = () if fragment.columns is None else (f"{fragment.columns[0]}:{fragment.columns[1]}",)
            yield SEPARATOR.join((fragment.parameter, fragment.key, str(fragment.start), *columns)), fragment


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _take_snapshot(engine: Engine, state: TrainState, lanes: Mapping[int, Any], asynchronous: bool) -> _Snapshot:
    """The fragments that this rank saves, copied if they do not stay until the thread has; or no more than their sizes,
    if training waits for the write."""
    tensors, shapes, metadata = {}, {}, {}
    for key, fragment in _saved(engine):
        if not asynchronous:
            tensors[key] = fragment.tensor.to("meta")
        else:
            tensors[key] = fragment.tensor if engine.fragments_stay else _copy(fragment.tensor)
        metadata[f"{fragment.parameter}{SEPARATOR}{fragment.key}"] = json.dumps(fragment.shape)
        if fragment.key == "master" and fragment.start == 0:  # who has its beginning tells it: not every rank all
            shapes[fragment.parameter] = list(fragment.shape)
    return _Snapshot(state, dict(lanes), engine.scalars(), tensors, metadata, shapes)


def _seal(folder: Path, snapshot: _Snapshot, shards: list[_Shard], plan: Mapping[str, Any]) -> None:
    """Write state.json and, last, manifest.json."""
    every_lane = {str(lane): position for one in shards for lane, position in one.lanes.items()}
    state_file = folder / "state.json"
    train = snapshot.state.to_dict()
    write_json(state_file, {"train": train, "optimizer": dict(snapshot.scalars), "lanes": every_lane})
    files = {one.name: {"bytes": one.num_bytes, "sha256": one.sha256} for one in shards}
    files[state_file.name] = {"bytes": state_file.stat().st_size, "sha256": _sha256(state_file)}
    parameters = {name: shape for one in shards for name, shape in one.shapes.items()}
    facts = {"format": FORMAT, "step": snapshot.state.step, "files": files, "parameters": parameters}
    write_json(folder / "manifest.json", {**facts, "plan": dict(plan)})
    _sync_folder(folder)


def point(root: Path, pointer: str, name: str) -> None:
    """Let the text file `pointer` ("latest", "best") name a checkpoint, in one move."""
    temporary = root / f".{pointer}"
    temporary.write_text(name + "\n", encoding="utf-8")
    temporary.replace(root / pointer)
    _sync_folder(root)


def best_of(root: Path) -> str | None:
    """The name of the best checkpoint, if one is known."""
    pointer = root / "best"
    return pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else None


def prune(root: Path, keep: int, keep_every: int | None = None, spared: Set[str] = frozenset()) -> None:
    """Delete all checkpoints but those that stay by `trainer.checkpoint.kept`, and those of names in `spared`."""
    saved = {path.name: path for path in root.glob("step_*") if path.is_dir() and is_step_name(path.name)}
    for name in sorted(saved.keys() - kept(saved, keep, keep_every, best_of(root)) - spared):
        # Renamed first: a half-deleted folder must not look like a checkpoint.
        doomed = saved[name].rename(root / f".doomed_{name}")
        shutil.rmtree(doomed)
    for leftover in root.glob(".doomed_*"):  # of a kill in the middle of the above
        shutil.rmtree(leftover, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people and programs, and make sure it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _fresh(folder: Path) -> str | None:
    """Make an empty folder, and take away what saves that were killed have left; returns why that cannot be."""
    try:
        for leftover in folder.parent.glob(".partial_*"):  # one save at a time: none is of another that goes on
            shutil.rmtree(leftover)
        folder.mkdir(parents=True)
    except OSError as error:
        return str(error)
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
