"""Copies of checkpoints on remote storage, so that a run outlives the disk it was written to.

    CHECKPOINT.REMOTE/NAME/config.yaml, tokenizer.json, metrics.jsonl ...   what a run directory needs to go on
    CHECKPOINT.REMOTE/NAME/checkpoints/step_00000200/                       as in the run directory
    CHECKPOINT.REMOTE/NAME/checkpoints/latest, best

Object stores have no rename: a copy is whole where its manifest, which is sent last, and every file that it lists are
there in the right sizes. What is fetched is also compared with the SHA-256 in the manifest.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback

from trainer.checkpoint import is_step_name, kept
from trainer.checkpoint.load import Checkpoint, read
from trainer.checkpoint.parse import MANIFEST, parse_manifest
from trainer.config import CheckpointConfig, Config, config_from_yaml
from trainer.data.remote import Retries, filesystem, open_file, retrying
from trainer.errors import CheckpointError, ConfigError, SetupError, UserError

_log = logging.getLogger(__name__)

_RUN_FILES = (
    *("config.yaml", "tokenizer.json", "metrics.jsonl", "quarantine.jsonl", "anomalies.jsonl"),
    *("wandb/run_id", "wandb/rows.jsonl", "checkpoints/best"),
)
"""What of a run directory goes along, where it is there; the rest is written anew when a run goes on."""

_AT_ONCE = 4
"""Files that are fetched at the same time."""


class RemoteRun:
    """A run's folder on remote storage. Methods raise OSError, in words without secrets, where faults do not pass
    within `data.retry_seconds`."""

    def __init__(self, config: Config) -> None:
        """Opens nothing yet. Raises SetupError where a package is missing that the URL needs, ConfigError for a URL
        that cannot be written to."""
        base = config.checkpoint.remote
        assert base is not None, "a run without copies has no remote folder"
        self.url = f"{base.rstrip('/')}/{config.name}"
        self._retries = Retries(total_seconds=config.data.get("retry_seconds", 300))
        self.num_bytes = Callback()
        """Its `value` grows with every piece that is sent."""
        try:
            self._files, self._root = filesystem(self.url, self._retries)
        except SetupError as error:
            raise SetupError(f"checkpoint.remote: {error}") from error
        except UserError as error:
            raise ConfigError(f"checkpoint.remote: {error}") from error
        if "https" in self._files.protocol:
            raise ConfigError(
                f"checkpoint.remote={base}: web servers take no files; use the URL of a store, such as s3://bucket/runs."
            )

    def config(self) -> Config | None:
        """The configuration that the run was written with; None where there is no such run. Raises CheckpointError
        where it is damaged."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "config.yaml")
            if not self._fetch("config.yaml", path):
                return None
            try:
                return config_from_yaml(path)
            except ConfigError as error:
                raise CheckpointError(str(error).replace(str(path), f"{self.url}/config.yaml")) from error

    def whole(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, manifest) of the whole checkpoints, newest first."""
        listing = self._listing()
        for name in sorted(listing, reverse=True):
            try:
                manifest = parse_manifest(self._read_manifest(name), f"{self.url}/checkpoints/{name}/{MANIFEST}")
            except FileNotFoundError:
                _log.warning("%s/checkpoints/%s has no manifest; it is not whole.", self.url, name)
                continue
            except CheckpointError as error:
                _log.warning("%s", error)
                continue
            if _has_all(listing[name], manifest):
                yield name, manifest
            else:
                _log.warning("%s/checkpoints/%s lacks files of its manifest; it is not whole.", self.url, name)

    def holds(self, name: str, folder: Path) -> bool:
        """Whether the local checkpoint `folder` is there as it is."""
        content = (folder / MANIFEST).read_bytes()
        files = self._listing().get(name, {})
        if MANIFEST not in files or not _has_all(files, parse_manifest(content, str(folder))):
            return False
        return self._read_manifest(name) == content

    def send(self, name: str, folder: Path, sent: set[str]) -> None:
        """Copy the local checkpoint `folder`; `sent`: its files that were sent in a try before, and now."""
        manifest = parse_manifest((folder / MANIFEST).read_bytes(), str(folder))
        if MANIFEST in self._listing().get(name, {}) and not sent:  # of another save of this step
            self._remove(f"checkpoints/{name}/{MANIFEST}")
        for file in [*sorted(manifest["files"]), MANIFEST]:
            if file not in sent:
                self._put(folder / file, f"checkpoints/{name}/{file}")
                sent.add(file)

    def send_run_files(self, directory: Path) -> None:
        """Copy what is small and a run directory needs to go on."""
        for name in _RUN_FILES:
            if (directory / name).is_file():
                self._put(directory / name, name)

    def point(self, pointer: str, name: str) -> None:
        """Let the text file `pointer` name a checkpoint."""
        where = f"{self._root}/checkpoints/{pointer}"
        retrying(lambda: self._files.pipe_file(where, f"{name}\n".encode()), self.url, self._retries)

    def prune(self, newest: str, checkpoint: CheckpointConfig, best: str | None) -> None:
        """Delete the checkpoints up to `newest` that need not be kept, and what is left of those that were cut
        short."""
        listing = self._listing()
        whole = [name for name in listing if name <= newest and MANIFEST in listing[name]]
        stay = kept(whole, checkpoint.keep, checkpoint.keep_every, best)
        for name in sorted(listing):
            if name <= newest and name not in stay:
                if name in whole:  # first: the half of a checkpoint must not look like one
                    self._remove(f"checkpoints/{name}/{MANIFEST}")
                where = f"{self._root}/checkpoints/{name}"
                retrying(partial(self._files.rm, where, recursive=True), self.url, self._retries)

    def fetch(self, name: str, manifest: Mapping[str, Any], root: Path) -> Checkpoint:
        """Fetch a whole checkpoint into the local folder `root`. Raises CheckpointError where it is damaged."""
        temporary, final = root / f".fetched_{name}", root / name
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        names = [*sorted(manifest["files"]), MANIFEST]
        try:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(lambda file: self._fetch(f"checkpoints/{name}/{file}", temporary / file), names))
            checkpoint = read(temporary)
            if final.exists():
                aside = root / f".damaged_{name}"
                shutil.rmtree(aside, ignore_errors=True)
                final.rename(aside)
            temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return replace(checkpoint, folder=final)

    def fetch_run_files(self, directory: Path, missing_only: bool) -> None:
        """Fetch what goes along with checkpoints; or only what `directory` does not have."""
        for name in _RUN_FILES:
            path = directory / name
            if not (missing_only and path.exists()):
                fetched = directory / f".{path.name}.fetched.partial"
                if self._fetch(name, fetched):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    fetched.replace(path)

    def _listing(self) -> dict[str, dict[str, int]]:
        """The sizes in bytes of each checkpoint's files, by their names."""
        root = f"{self._root}/checkpoints"
        self._files.invalidate_cache()
        found = retrying(lambda: self._files.find(root, detail=True), self.url, self._retries)
        listing: dict[str, dict[str, int]] = defaultdict(dict)
        for path, facts in found.items():
            folder, _, name = path[len(root) + 1 :].rpartition("/")
            if is_step_name(folder):
                listing[folder][name] = facts["size"]
        return dict(listing)

    def _read_manifest(self, name: str) -> bytes:
        with open_file(f"{self.url}/checkpoints/{name}/{MANIFEST}", self._retries) as file:
            return file.read()

    def _fetch(self, name: str, path: Path) -> bool:
        """Bring a file to `path`; False where there is none."""
        try:
            with open_file(f"{self.url}/{name}", self._retries) as file, path.open("wb") as local:
                shutil.copyfileobj(file, local, 8 << 20)
        except FileNotFoundError:
            return False
        return True

    def _put(self, path: Path, name: str) -> None:
        where = f"{self._root}/{name}"

        def put() -> None:
            if "file" in self._files.protocol:  # stores have no folders to make
                self._files.makedirs(self._files._parent(where), exist_ok=True)
            self._files.put_file(str(path), where, callback=self.num_bytes)

        retrying(put, self.url, self._retries)
        self.num_bytes.relative_update(1)  # some file systems tell nothing themselves

    def _remove(self, name: str) -> None:
        retrying(lambda: self._files.rm_file(f"{self._root}/{name}"), self.url, self._retries)


def _has_all(sizes: Mapping[str, int], manifest: Mapping[str, Any]) -> bool:
    return all(sizes.get(name) == facts["bytes"] for name, facts in manifest["files"].items())
