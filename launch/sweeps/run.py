"""The runs of a sweep, one after the other, and what came of them.

A run that is finished is not begun again, one that was cut short goes on, and one that fails does not keep the others
from running: the same command, given again, completes the sweep.
"""

from __future__ import annotations

import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from launch import prepare
from launch.sweeps.results import Row, Table, read_row
from trainer.build import part_problems
from trainer.composition import Axis, axes, execute
from trainer.config import Config, config_from_yaml, to_config
from trainer.errors import ConfigError, UserError
from trainer.guards.signals import PREEMPTED
from trainer.run_directory import RunDirectory

One = Callable[[DictConfig, list[str]], int]
"""Launches one composition; returns an exit code."""

FAILED_RUNS = 100
"""The exit code of a sweep is this plus how many runs have failed (at most 99)."""

POLL_SECONDS = 5.0
_ENDED = ("finished", "preempted", "failed")


@dataclass(frozen=True)
class Member:
    """One run of a sweep: its composition, the words it came from, and what it was given, by key."""

    composed: DictConfig
    words: list[str]
    values: Mapping[str, str]

    @property
    def directory(self) -> RunDirectory:
        """Its own, which all its ranks agree on: the name is of the overrides."""
        return RunDirectory(Path(self.composed.runs_dir) / str(self.composed.name))


def run_sweep(one: One, arguments: Sequence[str], method: str, trials: int) -> int:
    """Run all that `arguments` (with -m) stand for: every combination (`grid`) or `trials` of them (`optuna`).

    Returns 0, 75 if it was told to stop, or 100 + the number of runs that failed. Raises ConfigError for a command line
    that no run could be made of.
    """
    same, swept = axes(arguments)
    if not swept and method == "grid":  # one run under a name made of its values, as an agent asks for it
        return execute(one, arguments)
    folder = Path(_word(same, "runs_dir", "runs")) / "sweeps" / _folder_name(same, swept, method)
    one = _grouped(one, folder.name)
    if method == "grid":
        members = compositions(arguments, [axis.key for axis in swept])
        rows = run_all(one, members)
    elif method == "optuna":
        from launch.sweeps.search import search

        rows = search(one, same, swept, trials, folder)
    else:
        raise ConfigError(f"sweep={method} is neither grid nor optuna.")
    write(Table(rows), folder)
    failed = sum(row.state in ("failed", "refused") for row in rows)
    if any(row.state == "preempted" for row in rows):
        return PREEMPTED
    return FAILED_RUNS + min(failed, 99) if failed else 0


def compositions(arguments: Sequence[str], keys: Sequence[str]) -> list[Member]:
    """What Hydra makes of a sweep's command line, in its order, before anything is run."""
    members: list[Member] = []
    missing: list[DictConfig] = []

    def collect(composed: DictConfig, words: list[str]) -> int:
        if OmegaConf.is_missing(composed, "name"):
            missing.append(composed)
            return 0
        given = dict(word.partition("=")[::2] for word in words)
        members.append(Member(composed, words, {key: given[key] for key in keys if key in given}))
        return 0

    execute(collect, arguments)
    for composed in missing:
        to_config(composed, part_problems)  # raises: it says what the command line lacks
    return members


def run_all(one: One, members: Sequence[Member]) -> list[Row]:
    """The members in turn; after one that was told to stop, no other."""
    rows: list[Row] = []
    for number, member in enumerate(members, 1):
        print(f"sweep: run {number} of {len(members)}: {member.composed.name}", flush=True)
        stopped = bool(rows) and rows[-1].state in ("preempted", "not started")
        rows.append(row_of(member, "not started") if stopped else run(one, member))
    return rows


def run(one: One, member: Member) -> Row:
    """Launch one run, unless it is finished or runs already. Where the launcher submits, it has not ended then."""
    try:
        if _is_alive(member):
            return row_of(member, "submitted")
        config = to_config(member.composed, part_problems)
        if is_finished(member.directory, config):
            print(f"{member.directory.path} is finished", flush=True)
            return row_of(member, "finished")
        code = one(member.composed, member.words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return Row(str(member.composed.name), member.values, "refused")
    except Exception:
        traceback.print_exc()
        return Row(str(member.composed.name), member.values, "failed")
    row = row_of(member, "submitted")
    if code == 0:
        return replace(row, state="submitted") if _is_alive(member) else row
    return replace(row, state={PREEMPTED: "preempted", UserError.exit_code: "refused"}.get(code, "failed"))


def row_of(member: Member, otherwise: str) -> Row:
    """What the files of the run say."""
    return read_row(member.directory, str(member.composed.name), member.values, otherwise)


def is_finished(directory: RunDirectory, config: Config) -> bool:
    """Whether the run has done what `config` asks for. Raises ConfigError where it is another run by that name."""
    if directory.read_status().get("state") != "finished":
        return False
    directory.check(config)
    written = config_from_yaml(directory.config)
    return (written.steps, written.stop) == (config.steps, config.stop)


def _is_alive(member: Member) -> bool:
    """Whether the run has been started and has not ended."""
    folder = member.directory.path / "launch"
    if not (folder / "submitted.json").exists():
        return False
    launcher, handle = prepare.submitted(folder)
    return launcher.alive(handle) is True


def wait(member: Member) -> None:
    """Wait until a run that was submitted has ended."""
    launcher, handle = prepare.submitted(member.directory.path / "launch")
    while member.directory.read_status().get("state") not in _ENDED and launcher.alive(handle) is not False:
        time.sleep(POLL_SECONDS)


def write(table: Table, folder: Path) -> None:
    """sweep.md, sweep.csv and sweep.png in `folder`, and the table on the console."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.md").write_text(table.markdown(), encoding="utf-8")
    (folder / "sweep.csv").write_text(table.csv(), encoding="utf-8")
    drawn = find_spec("matplotlib") is not None and table.draw(folder / "sweep.png")
    print(f"\n{table.markdown()}\n{folder}: sweep.md, sweep.csv{', sweep.png' if drawn else ''}", flush=True)


def _grouped(one: One, group: str) -> One:
    """`one`, with the runs as a group of that name in W&B, unless the user gave another."""

    def launch(composed: DictConfig, words: list[str]) -> int:
        sink = OmegaConf.select(composed, "logging.wandb") or {}
        if "group" in sink and sink["group"] is None:
            grouped = OmegaConf.merge(composed, {"logging": {"wandb": {"group": group}}})
            assert isinstance(grouped, DictConfig)
            composed = grouped
        return one(composed, words)

    return launch


def _folder_name(same: Sequence[str], swept: Sequence[Axis], method: str) -> str:
    """What the sweep is about, for people, and a hash of all that makes it another one."""
    about = _word(same, "name", _word(same, "experiment", "sweep"))
    words = re.sub(r"[^\w.=+-]+", "_", "-".join([about, *(axis.key for axis in swept)]))[:80]
    return f"{words}-{sha256(repr((sorted(same), swept, method)).encode()).hexdigest()[:6]}"


def _word(words: Sequence[str], key: str, default: str) -> str:
    return next((word.partition("=")[2] for word in words if word.startswith(f"{key}=")), default)
