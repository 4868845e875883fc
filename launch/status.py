"""How the runs stand: `python -m launch.status [runs_dir=runs] [run=NAME] [--json]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.runs import RunState, find_runs, run_directory, state_of
from trainer.commands import run_command
from trainer.errors import ConfigError

COLOURS = {"running": "green", "finished": "blue", "failed": "red", "gone": "red", "preempted": "yellow"}


@dataclass(frozen=True)
class StatusOptions:
    """Arguments of `python -m launch.status`. run: only this one; json: a list of objects instead of a table."""

    runs_dir: str = "runs"
    run: str | None = None
    json: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    words = ["json=true" if word == "--json" else word for word in (sys.argv[1:] if argv is None else argv)]
    return run_command(StatusOptions, _status, str(__doc__), words)


def _status(options: StatusOptions) -> None:
    root = Path(options.runs_dir)
    if not root.is_dir():
        raise ConfigError(f"runs_dir={root} is no folder.")
    folders = [run_directory(options.run, options.runs_dir)] if options.run else list(find_runs(options.runs_dir))
    states = [state_of(folder, str(folder.relative_to(root))) for folder in folders]
    if options.json:
        print(json.dumps([asdict(state) for state in states], indent=1))
    else:
        _show(states, root)


def _show(states: Sequence[RunState], root: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    if not states:
        print(f"no runs in {root}")
        return
    table = Table("run", "state", "step", "last sign", "place", "reason", box=None)
    for one in states:
        state = f"[{COLOURS[one.state]}]{one.state}[/]" if one.state in COLOURS else one.state
        steps = f"{one.step:,}" if one.steps is None else f"{one.step:,}/{one.steps:,}"
        table.add_row(one.run, state, steps, _ago(one.age), one.place, one.reason)
    Console().print(table)


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


if __name__ == "__main__":
    sys.exit(main())
