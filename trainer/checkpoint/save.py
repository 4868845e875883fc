"""Write a checkpoint so that it is whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from trainer import distributed
from trainer.checkpoint import FORMAT, SEPARATOR, step_name
from trainer.engine.base import Engine
from trainer.state import TrainState


def save(root: Path, engine: Engine, state: TrainState, lanes: Mapping[int, Any], plan: Mapping[str, Any]) -> Path:
    """Save the run as it stands after `state.step`; called by all ranks together. Returns the checkpoint's folder.

    root: the run's `checkpoints` folder; lanes: positions of this rank's data lanes.
    """
    final = root / step_name(state.step)
    if final.exists():  # the same step of the same run: whole, so nothing to add
        return final
    partial = root / f".partial_{final.name}"
    distributed.on_rank_zero(lambda: _fresh(partial))
    shard = partial / f"shard_{distributed.rank():05d}.safetensors"
    shapes = _write_shard(shard, engine)
    facts = distributed.all_gather_objects((shard.name, shard.stat().st_size, _sha256(shard), shapes, dict(lanes)))

    def commit() -> None:
        every_lane = {str(lane): position for *_, part in facts for lane, position in part.items()}
        state_file = partial / "state.json"
        write_json(state_file, {"train": state.to_dict(), "optimizer": engine.scalars(), "lanes": every_lane})
        files = {name: {"bytes": size, "sha256": digest} for name, size, digest, *_ in facts}
        files[state_file.name] = {"bytes": state_file.stat().st_size, "sha256": _sha256(state_file)}
        parameters = {name: shape for *_, shapes, _ in facts for name, shape in shapes.items()}
        manifest = {"format": FORMAT, "step": state.step, "files": files, "parameters": parameters, "plan": dict(plan)}
        write_json(partial / "manifest.json", manifest)
        _sync_folder(partial)
        partial.rename(final)
        point(root, "latest", final.name)

    distributed.on_rank_zero(commit)
    return final


def point(root: Path, pointer: str, name: str) -> None:
    """Let the text file `pointer` ("latest", "best") name a checkpoint, in one move."""
    temporary = root / f".{pointer}"
    temporary.write_text(name + "\n", encoding="utf-8")
    temporary.replace(root / pointer)
    _sync_folder(root)


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one. On rank 0 only."""
    best = (root / "best").read_text(encoding="utf-8").strip() if (root / "best").exists() else None
    saved = sorted(path for path in root.glob("step_*") if path.is_dir())
    for path in saved[: max(0, len(saved) - max(1, keep))]:
        if path.name != best:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed = path.rename(path.with_name(f".doomed_{path.name}"))
            shutil.rmtree(doomed)


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people and programs, and make sure it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _fresh(folder: Path) -> None:
    """An empty folder, also after a save that was killed."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _write_shard(path: Path, engine: Engine) -> dict[str, list[int]]:
    """This rank's fragments into one file; returns the shapes of the parameters in it.

    Where every rank holds the same (`engine.replicated`), each writes its turn of the fragments.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    tensors, shapes, whole = {}, {}, {}
    for index, fragment in enumerate(engine.fragments()):
        if engine.replicated and index % world_size != rank:
            continue
        key = SEPARATOR.join((fragment.parameter, fragment.key, str(fragment.start)))
        tensors[key] = fragment.tensor.detach().cpu().contiguous()
        whole[f"{fragment.parameter}{SEPARATOR}{fragment.key}"] = json.dumps(fragment.shape)
        if fragment.key == "master":
            shapes[fragment.parameter] = list(fragment.shape)
    save_file(tensors, path, metadata=whole)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return shapes


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
