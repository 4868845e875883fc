"""What a run or one of its ranks said: `python -m launch.logs run=NAME [rank=N] [lines=50] [--follow]`.

Without a rank, what the launcher keeps of all ranks' output (Slurm does); else the messages of that rank.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launch.runs import run_directory, state_of
from trainer.commands import run_command
from trainer.errors import CheckpointError
from trainer.run_directory import RunDirectory


@dataclass(frozen=True)
class LogsOptions:
    """Arguments of `python -m launch.logs`. lines: the last ones to show first; follow: go on until the run ends."""

    run: str
    rank: int | None = None
    runs_dir: str = "runs"
    lines: int = 50
    follow: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    words = ["follow=true" if word == "--follow" else word for word in (sys.argv[1:] if argv is None else argv)]
    return run_command(LogsOptions, _logs, str(__doc__), words)


def _logs(options: LogsOptions) -> None:
    directory = run_directory(options.run, options.runs_dir)
    path = _log(directory, options)
    with path.open(encoding="utf-8", errors="replace") as file, suppress(KeyboardInterrupt):
        sys.stdout.writelines(deque(file, maxlen=options.lines))
        while options.follow:
            over = state_of(directory, options.run).over  # asked first: what came before its end is still shown
            for line in file:
                sys.stdout.write(line)
            sys.stdout.flush()
            if over:
                return
            time.sleep(0.5)


def _log(directory: Path, options: LogsOptions) -> Path:
    """Raises CheckpointError, naming the ranks that have a log, where there is none."""
    outputs = sorted((directory / "launch").glob("*.out"), key=lambda path: path.stat().st_mtime)
    if options.rank is None and outputs:
        return outputs[-1]
    path = RunDirectory(directory).log(options.rank or 0)
    if not path.is_file():
        known = sorted(int(log.stem.rpartition("_")[2]) for log in path.parent.glob("rank_*.log"))
        raise CheckpointError(
            f"rank={options.rank}: {path} is not there; ranks with a log: {', '.join(map(str, known)) or 'none'}."
        )
    return path


if __name__ == "__main__":
    sys.exit(main())
