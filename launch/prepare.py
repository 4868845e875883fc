"""From words to a job, and everything about it on disk before anything is started."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import OmegaConf

import trainer
from launch.job import Job, Launcher
from trainer.build import build, part_problems
from trainer.composition import compose
from trainer.config import Config, Resume, config_to_dict, to_config
from trainer.errors import CheckpointError, ConfigError, redacted
from trainer.plan import make_plan
from trainer.run_directory import RunDirectory

if TYPE_CHECKING:
    from omegaconf import DictConfig

HYDRA = {
    "defaults": ["_self_", {"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}],
    "hydra": {"output_subdir": None, "run": {"dir": "."}, "job": {"name": "trainer", "chdir": False}},
}
"""What makes a frozen configuration a primary file for Hydra that leaves nothing of its own behind."""


def make_launcher(words: Sequence[str]) -> tuple[Launcher, dict[str, Any]]:
    """The launcher that `launcher=NAME launcher.key=value ...` names, and its part. Raises ConfigError."""
    composed = OmegaConf.to_container(compose(words, "launch"), resolve=True)
    assert isinstance(composed, dict)
    launcher = build(composed["launcher"], "launcher")
    assert isinstance(launcher, Launcher), f"{type(launcher)} is no launcher"
    return launcher, composed["launcher"]


def make_job(composed: DictConfig, words: Sequence[str], launcher: Launcher) -> Job:
    """The job of a composition of the trainer's, refused (ConfigError, CheckpointError, SetupError) where the trainer
    would refuse it on the launcher's ranks, or where another run has its name. Nothing is written."""
    config = to_config(composed, part_problems)
    make_plan(config, launcher.world_size)
    RunDirectory.of(config).check(config)
    if config.resume == Resume.never:  # checked now; a restart of this very job must go on
        config = replace(config, resume=Resume.auto)
    directory = Path(config.runs_dir).absolute() / config.name
    return Job(config.name, directory, tuple(words), replace(config, dry_run=False), Path.cwd())


def submitted(folder: Path) -> tuple[Launcher, dict[str, Any]]:
    """The launcher that started the run, with the options of then, and what it remembered. Raises CheckpointError."""
    launcher, _ = launcher_in(folder)
    try:
        return launcher, dict(json.loads((folder / "submitted.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} does not say what was submitted: {error}") from error


def launcher_in(folder: Path) -> tuple[Launcher, dict[str, Any]]:
    """The launcher in a job's folder, and its part. Raises CheckpointError where there is none, or one that is not
    ours: a stranger's run must not name code to run."""
    path = folder / "launcher.yaml"
    try:
        part = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not str(part["_target_"]).startswith("launch."):
            raise CheckpointError(f"{path} names code outside launch: {part['_target_']}.")
        return build(part, "launcher"), part
    except (OSError, yaml.YAMLError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} does not say how the run was launched: {error}") from error


def job_in(directory: Path) -> Job:
    """The job that was launched for the run in `directory`, as it was. Raises CheckpointError."""
    folder = directory.absolute() / "launch"
    try:
        config = frozen_config(folder)
        words = yaml.safe_load((folder / "overrides.yaml").read_text(encoding="utf-8"))
        cwd = Path(json.loads((folder / "origin.json").read_text(encoding="utf-8"))["cwd"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{folder} does not say what was launched: {error}") from error
    return Job(config.name, directory.absolute(), tuple(words), config, cwd)


def said(handle: Mapping[str, Any]) -> str:
    """What was submitted, in words: `host a, pid 17`."""
    return ", ".join(
        f"{name} {value}"
        for name, value in handle.items()
        if name not in ("created", "directory") and value is not None
    )


def frozen_config(folder: Path) -> Config:
    """The configuration in a job's folder."""
    loaded = yaml.safe_load((folder / "train.yaml").read_text(encoding="utf-8"))
    return to_config({key: value for key, value in loaded.items() if key not in HYDRA})


def files_of(job: Job, launcher: Launcher, part: Mapping[str, Any]) -> dict[str, str]:
    """Everything that is to be in the job's folder, text by name."""
    return {
        "train.yaml": train_yaml(job.config),
        "overrides.yaml": yaml.safe_dump(list(job.words)),
        "launcher.yaml": yaml.safe_dump(dict(part), sort_keys=False),
        "origin.json": json.dumps(origin(job), indent=1) + "\n",
        **launcher.render(job),
    }


def train_yaml(config: Config) -> str:
    """The frozen configuration, as a primary file for the trainer."""
    return yaml.safe_dump({**HYDRA, **config_to_dict(config)}, sort_keys=False)


def write(job: Job, files: Mapping[str, str]) -> None:
    """Write `files` into the job's folder, and take away what an earlier launch had there, but for its output."""
    for path in (path for path in job.folder.glob("*") if path.is_file() and path.suffix != ".out"):
        path.unlink()
    for name, text in files.items():
        path = job.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if text.startswith("#!"):
            path.chmod(0o755)


def origin(job: Job) -> dict[str, Any]:
    """Where and when the run was launched, and which code will run: version, and, in a clone, commit, branch and which
    files differ from it, without their content."""
    root = Path(__file__).resolve().parent.parent
    facts: dict[str, Any] = {
        "cwd": str(job.cwd),
        "host": socket.gethostname(),
        "launched": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "version": trainer.__version__,
    }
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    if commit is not None:
        facts["commit"] = commit
        facts["branch"] = _git(root, "branch", "--show-current")
        facts["changed"] = (_git(root, "status", "--porcelain") or "").splitlines()
        facts["diffstat"] = _git(root, "diff", "--shortstat", "HEAD")
    return facts


def _git(root: Path, *words: str) -> str | None:
    """What git prints; None where there is no git or it fails."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return redacted(done.stdout.rstrip()) if done.returncode == 0 else None
