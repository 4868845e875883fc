"""Checkpoints as versions of a W&B artifact, and exports: where they lie, or their files where that is asked for."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import redacted
from trainer.metrics.wandb import client

if TYPE_CHECKING:
    from trainer.metrics.wandb.client import Artifact, Run

_log = logging.getLogger(__name__)

ARTIFACTS = ("none", "reference", "upload")
_MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of a run as versions of one artifact, with the aliases `step-200`, `latest` and `best`.

    Versions of checkpoints that the run has deleted are deleted, where the server can be asked.
    """

    def __init__(
        self,
        how: str,
        start: client.Start,
        config: Mapping[str, Any],
        server: Callable[[], client.Server] | None,
    ) -> None:
        """how: one of ARTIFACTS; server: None for an offline run."""
        self._how, self._config, self._server = how, config, server
        self._name = checkpoint_name(start.name, start.run_id)
        self._record = start.directory / "wandb" / "artifacts.json"
        self._there: list[int] = []
        with suppress(OSError, ValueError):
            self._there = [int(step) for step in json.loads(self._record.read_text(encoding="utf-8"))]

    def log(self, run: Run, step: int, folder: Path) -> None:
        """A version for the checkpoint in `folder`. What goes wrong is told, and the run goes on."""
        if self._how == "none" or step in self._there:
            return
        try:
            version = client.artifact(self._name, "model", self._metadata(step, folder))
            fill(version, folder, self._place(folder), self._how == "upload", "checkpoint")
            best = folder.parent / "best"
            is_best = best.is_file() and best.read_text(encoding="utf-8").strip() == folder.name
            run.log_artifact(version, aliases=["latest", f"step-{step}", *(["best"] if is_best else [])])
            self._there.append(step)
            self._forget(folder.parent)
        except Exception as error:  # an artifact is a view, too
            _log.warning("W&B: the checkpoint of step %d is no artifact: %s", step, error)

    def _metadata(self, step: int, folder: Path) -> dict[str, Any]:
        manifest = hashlib.sha256((folder / _MANIFEST).read_bytes()).hexdigest()
        return {"step": step, "manifest_sha256": manifest, "place": self._place(folder), "config": dict(self._config)}

    def _place(self, folder: Path) -> str:
        """The URL of its copy on remote storage, or of the folder."""
        remote = self._config.get("checkpoint", {}).get("remote")
        if remote is None:
            return folder.resolve().as_uri()
        return redacted(f"{remote.rstrip('/')}/{self._config['name']}/checkpoints/{folder.name}")

    def _forget(self, checkpoints: Path) -> None:
        """Delete versions whose checkpoints have gone."""
        for step in list(self._there):
            if self._server is not None and not (checkpoints / f"step_{step:08d}").exists():
                try:
                    self._server().delete(f"{self._name}:step-{step}")
                except Exception as error:
                    _log.info("W&B: the version step-%d was not deleted: %s", step, error)
                    continue
                self._there.remove(step)
        self._record.write_text(json.dumps(self._there), encoding="utf-8")


def fill(made: Artifact, folder: Path, place: str, upload: bool, name: str) -> None:
    """Put the files of `folder` into an artifact; or no more than their names at `place` and, for a checkpoint, its
    manifest. name: of the place within the artifact. Stores whose package W&B lacks stand in the metadata alone."""
    if upload:
        made.add_dir(str(folder), policy="immutable")  # else W&B copies every file first
        return
    if (folder / _MANIFEST).is_file():
        made.add_file(str(folder / _MANIFEST), policy="immutable")
    try:
        made.add_reference(place, name=name, checksum=False)
    except Exception as error:
        _log.info("W&B: no reference to %s: %s", place, error)


def checkpoint_name(run_name: str, run_id: str) -> str:
    """What the artifact of a run's checkpoints is called."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', run_name)[:80]}-{run_id}"
