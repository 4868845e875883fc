"""The run directory: a public interface that scripts and users rely on. See docs/architecture.md for its files."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.build import with_defaults
from trainer.config import Config, Resume, config_from_yaml, config_to_dict, differences
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.errors import CheckpointError, ConfigError, DataError, SetupError
from trainer.impossible import is_run_name
from trainer.metrics.json_lines import JsonLines, truncate_after

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Copy:
    """What remote storage holds of a run. config: that it was written with; has_checkpoint: there is a whole one."""

    url: str
    config: Config | None
    has_checkpoint: bool


class RunDirectory:
    """Paths and small files of one run. Only rank 0 writes the shared files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.quarantine = path / "quarantine.jsonl"
        self.tokenizer = path / "tokenizer.json"
        self.config = path / "config.yaml"
        self.evaluation = path / "evaluation.json"
        self.heartbeats = path / "heartbeats"
        self.profile = path / "profile"

    @classmethod
    def of(cls, config: Config) -> RunDirectory:
        """The directory that `config` names."""
        return cls(Path(config.runs_dir) / config.name)

    @classmethod
    def existing(cls, name: str, runs_dir: str, told: str) -> RunDirectory:
        """The directory of the run `name`; told: the words that named it. Raises ConfigError for a name that leads out
        of `runs_dir`, CheckpointError, listing the runs there, where there is none."""
        if not is_run_name(name):
            raise ConfigError(f"{told}: {name!r} is no name of a run; give its folder below runs_dir={runs_dir}.")
        directory = cls(Path(runs_dir) / name)
        if not directory.config.is_file():
            others = ", ".join(sorted(path.parent.name for path in Path(runs_dir).glob("*/config.yaml"))) or "none"
            raise CheckpointError(f"{told}: there is no {directory.config}; runs in {runs_dir}: {others}.")
        return directory

    def check(self, config: Config, copy: Copy | None = None) -> None:
        """Refuse what must not be overwritten or cannot be resumed, here or in the `copy`; writes nothing.

        Raises ConfigError showing the difference, CheckpointError under resume=must without a checkpoint, SetupError
        where the folder cannot be written.
        """
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise _unwritable(config, parent, "it is no folder, or you may not write there")
        has_checkpoint = any(self.checkpoints.glob("step_*")) or (copy is not None and copy.has_checkpoint)
        if config.resume == Resume.must and not has_checkpoint:
            where = self.checkpoints if copy is None else f"neither {self.checkpoints} nor {copy.url}"
            holds = "holds no checkpoint" if copy is None else "holds a checkpoint"
            raise CheckpointError(f"resume=must, but {where} {holds}; use resume=auto to begin.")
        if self.config.exists():
            _check_same(config, str(self.path), lambda: config_from_yaml(self.config))
        if copy is not None and (written := copy.config) is not None:
            _check_same(config, copy.url, lambda: written)

    def claim(
        self,
        config: Config,
        overrides: Sequence[str],
        plan: Mapping[str, Any],
        ds_config: Mapping[str, Any],
        tokenizer: Tokenizer | None,
    ) -> None:
        """Create the directory, write what the run is made of, and take away what a kill has left. Raises SetupError
        where that cannot be."""
        try:
            for folder in ("checkpoints", "logs", "generations"):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
            for leftover in (*self.path.glob(".*.partial"), *self.heartbeats.glob("*.partial")):
                leftover.unlink(missing_ok=True)
            _replace(self.config, yaml.safe_dump(config_to_dict(config), sort_keys=False))
            _replace(self.path / "overrides.yaml", yaml.safe_dump(list(overrides)))
            _replace(self.path / "plan.json", _json(plan))
            _replace(self.path / "ds_config.json", _json(ds_config))
            if tokenizer is not None and not self.tokenizer.exists():
                _replace(self.tokenizer, tokenizer.to_json())
        except OSError as error:
            raise _unwritable(config, self.path, error.strerror or str(error)) from error

    def read_tokenizer(self) -> Tokenizer:
        """The run's tokenizer. Raises CheckpointError where its file is missing or damaged."""
        try:
            return load_tokenizer(self.tokenizer)
        except DataError as error:
            raise CheckpointError(f"{error} Restore the file the run was begun with.") from error

    def log(self, rank: int) -> Path:
        """Where a rank's messages go."""
        return self.path / "logs" / f"rank_{rank:05d}.log"

    def stacks(self, rank: int) -> Path:
        """Where the stacks of a rank that hangs go."""
        return self.path / "logs" / f"stacks_rank_{rank:05d}.txt"

    def open_trace(self, rank: int, last_step: int) -> JsonLines:
        """The trace of a rank's samples. Rank 0 cuts all back to `last_step`: there may have been more ranks before."""
        folder = self.path / "samples"
        for path in folder.glob("rank_*.jsonl") if rank == 0 else ():
            truncate_after(path, last_step)
        return JsonLines(self._trace(rank), last_step)

    def _trace(self, rank: int) -> Path:
        return self.path / "samples" / f"rank_{rank:05d}.jsonl"

    def open_quarantine(self, last_step: int) -> JsonLines:
        """The records that gave no sample, cut back to `last_step`."""
        return JsonLines(self.quarantine, last_step)

    def rewind(self, rank: int, last_step: int) -> None:
        """Cut the files of steps that this rank writes back to `last_step`; they may be open, each line is appended."""
        for path in (self._trace(rank), *((self.metrics, self.quarantine) if rank == 0 else ())):
            if path.exists():
                truncate_after(path, last_step)

    def status(self, state: str, step: int, reason: str, exit_code: int | None = None) -> None:
        """Say how the run stands: running, finished, preempted or failed. What cannot be written is a warning."""
        path = self.path / "status.json"
        try:
            _replace(path, _json({"state": state, "step": step, "reason": reason, "exit_code": exit_code}))
        except OSError as error:
            _log.warning("%s stays as it is: %s", path, error)

    def conclude(self, state: str, reason: str, exit_code: int) -> None:
        """The last word of `status`, at the step it last told."""
        self.status(state, self.read_status().get("step", 0), reason, exit_code)

    def read_status(self) -> dict[str, Any]:
        """The last status; {} before the first."""
        path = self.path / "status.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _check_same(config: Config, place: str, written: Callable[[], Config]) -> None:
    """Refuse to go on with the run in `place`, where that must not be. Raises ConfigError."""
    if config.resume == Resume.never:
        raise ConfigError(f"resume=never, but {place} exists; choose another name, or resume=auto to go on with it.")
    changed = differences(with_defaults(written(), config), config)
    if changed:
        raise ConfigError(
            f"{place} was written by another configuration; choose another name=..., or undo the difference:\n  "
            + "\n  ".join(changed)
        )


def _unwritable(config: Config, path: Path, reason: str) -> SetupError:
    return SetupError(f"runs_dir={config.runs_dir}: cannot write {path}: {reason}; choose another runs_dir.")


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1) + "\n"


def _replace(path: Path, text: str) -> None:
    """Write a file in one move: a kill or a full disk leaves the one before. Any rank may do so at the same time."""
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
