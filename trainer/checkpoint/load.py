"""Find whole checkpoints, and read from them exactly the ranges that a rank needs."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from trainer.checkpoint import FORMAT, SEPARATOR, step_name
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


def newest(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None where there is none.

    Raises CheckpointError naming the damage when there are checkpoints but none is whole: starting from zero in silence
    would throw a run away.
    """
    folders = sorted((path for path in root.glob("step_*") if path.is_dir()), reverse=True)
    damage = []
    for folder in folders:
        try:
            return read(folder)
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
        if folder.name > step_name(step):
            aside = folder.with_name(f".damaged_{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            _log.warning("The damaged checkpoint %s is now %s", folder, folder.rename(aside).name)


def find(root: Path, which: str) -> Checkpoint:
    """The checkpoint named by `which`: "latest", "best", a step number, or a folder's name.

    Raises CheckpointError listing what exists.
    """
    pointer = root / which
    if which in ("latest", "best"):
        if which == "latest" and not pointer.is_file():
            checkpoint = newest(root)
            if checkpoint is not None:
                return checkpoint
        name = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else which
    else:
        name = step_name(int(which)) if which.isdigit() else which
    if not (root / name).is_dir():
        existing = ", ".join(sorted(path.name for path in root.glob("step_*"))) or "none"
        raise CheckpointError(f"checkpoint={which} does not exist in {root}; there are: {existing}.")
    return read(root / name)


def read(folder: Path) -> Checkpoint:
    """Read and verify a checkpoint's manifest, the presence, size and SHA-256 of its files.

    Raises CheckpointError naming the file that is missing or damaged.
    """
    manifest = _read_json(folder / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / 'manifest.json'}: format {manifest.get('format')} is not {FORMAT};"
            " use the version that wrote it."
        )
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; the checkpoint is not whole.")
        if path.stat().st_size != facts["bytes"]:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, its manifest says {facts['bytes']}; it is damaged."
            )
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                raise CheckpointError(f"{path} does not match the SHA-256 in its manifest; it is damaged.")
    state = _read_json(folder / "state.json")
    lanes = {int(lane): position for lane, position in state["lanes"].items()}
    return Checkpoint(folder, manifest, TrainState.from_dict(state["train"]), state["optimizer"], lanes)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is not whole.") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); it is damaged.") from None


class Reader:
    """Reads ranges of flattened states out of a checkpoint's shards, whoever wrote them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files = ExitStack()
        self._pieces: dict[tuple[str, str], list[tuple[int, int, str, Any]]] = defaultdict(list)
        self.shapes: dict[tuple[str, str], tuple[int, ...]] = {}

    def __enter__(self) -> Reader:
        for name in sorted(self._checkpoint.manifest["files"]):
            if name.endswith(".safetensors"):
                file = self._files.enter_context(safe_open(self._checkpoint.folder / name, framework="pt"))
                for whole, shape in (file.metadata() or {}).items():
                    parameter, state = whole.split(SEPARATOR)
                    self.shapes[parameter, state] = tuple(json.loads(shape))
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    parameter, state, start = key.split(SEPARATOR)
                    numel = file.get_slice(key).get_shape()[0]
                    self._pieces[parameter, state].append((int(start), numel, key, file))
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def read_into(self, parameter: str, state: str, start: int, target: torch.Tensor) -> None:
        """Fill the flat `target` with elements [start, start + numel) of a state, from as many shards as it takes.

        Raises CheckpointError when the checkpoint does not hold them all.
        """
        end, filled = start + target.numel(), 0
        for piece_start, numel, key, file in self._pieces[parameter, state]:
            begin, stop = max(start, piece_start), min(end, piece_start + numel)
            if begin < stop:
                part = file.get_slice(key)[begin - piece_start : stop - piece_start]
                target[begin - start : stop - start].copy_(part)
                filled += stop - begin
        if filled < target.numel():
            raise CheckpointError(
                f"{self._checkpoint.folder}: {parameter} ({state}) has {filled} of the {target.numel()} elements"
                f" wanted from {start}; the checkpoint was written by another model or optimizer."
            )

    def whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter's master weights, one at a time, fp32."""
        for (parameter, state), shape in self.shapes.items():
            if state == "master":
                target = torch.empty(torch.Size(shape).numel())
                self.read_into(parameter, state, 0, target)
                yield parameter, target.view(shape)


def load(checkpoint: Checkpoint, engine: Engine) -> None:
    """Put a checkpoint's weights and optimizer states into an engine of any kind, on any number of ranks.

    Raises CheckpointError listing parameters that differ in name or shape.
    """
    with Reader(checkpoint) as reader:
        problems = []
        for fragment in engine.fragments():
            shape = reader.shapes.get((fragment.parameter, fragment.key))
            if shape is None:
                problems.append(f"{fragment.parameter} ({fragment.key}) is not in the checkpoint")
            elif shape != fragment.shape:
                problems.append(
                    f"{fragment.parameter} ({fragment.key}): {shape} in the checkpoint, {fragment.shape} in the model"
                )
        if problems:
            raise CheckpointError(f"{checkpoint.folder} does not fit this model:\n  " + "\n  ".join(problems))
        for fragment in engine.fragments():
            reader.read_into(fragment.parameter, fragment.key, fragment.start, fragment.tensor)
    engine.after_load(checkpoint.scalars)
