"""`python -m trainer.report run=NAME [run=NAME ...] [to=FILE.html]`: one HTML page and a PNG of the curves.

Several runs are drawn in the same charts, and their settings compared. The page is self-contained: it opens anywhere,
without a network. A run may still be going on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from trainer.commands import run_command
from trainer.errors import ConfigError
from trainer.report.history import read_history
from trainer.report.page import write_report
from trainer.run_directory import RunDirectory


@dataclass(frozen=True)
class ReportOptions:
    """Arguments of `python -m trainer.report`. to: null for report.html in the first run's directory."""

    run: list[str] = field(default_factory=list)
    to: str | None = None
    runs_dir: str = "runs"


def report(options: ReportOptions) -> None:
    """Write the page and, beside it, the PNG; print where. Raises ConfigError, CheckpointError and SetupError."""
    if not options.run:
        raise ConfigError("run=... is missing: the name of a run; repeat it to compare several.")
    directories = [RunDirectory.existing(name, options.runs_dir, f"run={name}") for name in dict.fromkeys(options.run)]
    page = Path(options.to) if options.to is not None else directories[0].path / "report.html"
    told = None if options.to is None else f"to={page}"
    write_report([read_history(directory) for directory in directories], page, told)
    print(f"{page}\n{page.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(run_command(ReportOptions, report, __doc__ or ""))
