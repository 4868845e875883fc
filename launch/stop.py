"""Ask a run to save and end: `python -m launch.stop run=NAME [runs_dir=runs]`. The second time it is ended at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from launch.prepare import submitted
from launch.runs import run_directory
from trainer.commands import run_command


@dataclass(frozen=True)
class StopOptions:
    """Arguments of `python -m launch.stop`. hard: end it at once, the first time already."""

    run: str
    runs_dir: str = "runs"
    hard: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(StopOptions, _stop, str(__doc__), argv)


def _stop(options: StopOptions) -> None:
    folder = run_directory(options.run, options.runs_dir) / "launch"
    launcher, handle = submitted(folder)
    if launcher.alive(handle) is False:
        print(f"{options.run} has ended already")
        return
    asked = folder / "asked_to_stop"
    hard = options.hard or asked.exists()
    print(f"{options.run}: {launcher.stop(handle, hard)}")
    asked.touch()


if __name__ == "__main__":
    sys.exit(main())
