"""One run to launch, and what a launcher has to do with it."""

from __future__ import annotations

import json
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import Config


@dataclass(frozen=True)
class Job:
    """One run: what was asked for, checked and frozen.

    name: of the run; directory: its folder, absolute; words: of the trainer's command line, as typed; config: what they
    came to; cwd: where the command was given, absolute: relative paths of the configuration begin there.
    """

    name: str
    directory: Path
    words: tuple[str, ...]
    config: Config
    cwd: Path

    @property
    def folder(self) -> Path:
        """Where everything that concerns launching lies."""
        return self.directory / "launch"

    def trainer_words(self, folder: Path | None = None) -> list[str]:
        """Words after `python` that train from the frozen configuration, train.yaml in `folder` (None: this job's)."""
        return ["-m", "trainer", f"--config-path={folder or self.folder}"]

    def script(self, environment: Mapping[str, str], command: list[str], begin: str = "") -> str:
        """A bash script that becomes `command` in the job's working directory. environment: defaults, which variables
        that are set already overrule; begin: lines before all others."""
        lines = [f'export {name}="${{{name}:-{value}}}"' for name, value in environment.items()]
        head = ["#!/usr/bin/env bash", *begin.splitlines(), "set -euo pipefail", f"cd -- {shlex.quote(str(self.cwd))}"]
        return "\n".join([*head, *lines, f"exec {shlex.join(command)}", ""])

    def remember(self, handle: Mapping[str, Any]) -> None:
        """Write down what was submitted, for `Launcher.alive` and `stop`: numbers and texts by name."""
        partial = self.folder / ".submitted.json.partial"
        partial.write_text(json.dumps(dict(handle), indent=1) + "\n", encoding="utf-8")
        partial.replace(self.folder / "submitted.json")


class Launcher(ABC):
    """A place where runs run. Implementations are frozen dataclasses; their fields are the keys of their YAML file."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """Processes of the whole job, which the configuration must fit. Raises ConfigError, SetupError."""

    @abstractmethod
    def render(self, job: Job) -> Mapping[str, str]:
        """The files that say what `submit` will do: text by name, to be written below `job.folder`; those whose text
        begins with `#!` become executable. Raises ConfigError for what cannot be; touches nothing."""

    def require(self) -> None:  # noqa: B027  # most places need nothing
        """Raise SetupError where this machine lacks what submitting needs; not called by a dry run."""

    @abstractmethod
    def submit(self, job: Job) -> int:
        """Start what was rendered, and `job.remember` it as soon as it is known. Returns an exit code: of the run where
        this waits for its end, else 0. Raises SetupError where the place refuses it."""

    @abstractmethod
    def alive(self, handle: Mapping[str, Any]) -> bool | None:
        """Whether what was submitted runs or waits to run; None where that cannot be told from here."""

    @abstractmethod
    def stop(self, handle: Mapping[str, Any], hard: bool) -> str:
        """Ask it to save and end; `hard`: end it at once. Returns, in words, what was done. Raises SetupError where
        that cannot be done from here."""


def at_least(least: int, **options: int | None) -> None:
    """Raise ValueError, which becomes a ConfigError, for the first of a launcher's options that is below `least`."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"{name}={value} is below the least possible value, {least}")


def python() -> str:
    """The interpreter of this environment, for scripts that run on machines that share it."""
    return sys.executable
