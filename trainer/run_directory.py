"""The run directory: a public interface that scripts and users rely on. See docs/architecture.md for its files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainer.config import Config, Resume, config_from_yaml, config_to_dict, differences
from trainer.data.tokenizer import Tokenizer
from trainer.errors import CheckpointError, ConfigError, SetupError
from trainer.metrics.json_lines import JsonLines, truncate_after


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

    @classmethod
    def of(cls, config: Config) -> RunDirectory:
        """The directory that `config` names."""
        return cls(Path(config.runs_dir) / config.name)

    def check(self, config: Config) -> None:
        """Refuse what must not be overwritten or cannot be resumed; writes nothing.

        Raises ConfigError showing the difference, CheckpointError under resume=must without a checkpoint, SetupError
        where the folder cannot be written.
        """
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise _unwritable(config, parent, "it is no folder, or you may not write there")
        has_checkpoint = any(self.checkpoints.glob("step_*"))
        if config.resume == Resume.must and not has_checkpoint:
            raise CheckpointError(f"resume=must, but {self.checkpoints} holds no checkpoint; use resume=auto to begin.")
        if not self.config.exists():
            return
        if config.resume == Resume.never:
            raise ConfigError(
                f"resume=never, but {self.path} exists; choose another name, or resume=auto to go on with it."
            )
        changed = differences(config_from_yaml(self.config), config)
        if changed:
            raise ConfigError(
                f"{self.path} was written by another configuration; choose another name=..., or undo the"
                " difference:\n  " + "\n  ".join(changed)
            )

    def claim(
        self,
        config: Config,
        overrides: Sequence[str],
        plan: Mapping[str, Any],
        ds_config: Mapping[str, Any],
        tokenizer: Tokenizer | None,
    ) -> None:
        """Create the directory and write what the run is made of. Raises SetupError where that cannot be."""
        try:
            for folder in ("checkpoints", "logs", "generations"):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(config, self.path, error.strerror or str(error)) from error
        self.config.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False), encoding="utf-8")
        (self.path / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)), encoding="utf-8")
        _write_json(self.path / "plan.json", plan)
        _write_json(self.path / "ds_config.json", ds_config)
        if tokenizer is not None and not self.tokenizer.exists():
            tokenizer.save(self.tokenizer)

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
        """Say how the run stands: running, finished, preempted or failed. Replaced in one move."""
        partial = self.path / f".status_{os.getpid()}.json"  # any rank may have to tell of a hang
        _write_json(partial, {"state": state, "step": step, "reason": reason, "exit_code": exit_code})
        partial.replace(self.path / "status.json")

    def conclude(self, state: str, reason: str, exit_code: int) -> None:
        """The last word of `status`, at the step it last told."""
        self.status(state, self.read_status().get("step", 0), reason, exit_code)

    def read_status(self) -> dict[str, Any]:
        """The last status; {} before the first."""
        path = self.path / "status.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _unwritable(config: Config, path: Path, reason: str) -> SetupError:
    return SetupError(f"runs_dir={config.runs_dir}: cannot write {path}: {reason}; choose another runs_dir.")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
