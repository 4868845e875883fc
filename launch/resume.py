"""Start a run again as it was launched: `python -m launch.resume run=NAME [runs_dir=runs]`.

It goes on from its newest checkpoint, with the configuration and the launcher's options of then.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from launch import prepare
from launch.runs import check_free, run_directory
from trainer.commands import run_command
from trainer.run_directory import RunDirectory


@dataclass(frozen=True)
class ResumeOptions:
    """Arguments of `python -m launch.resume`."""

    run: str
    runs_dir: str = "runs"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, of the run where the launcher waits for it."""
    codes = [0]
    refused = run_command(ResumeOptions, lambda options: codes.append(_resume(options)), str(__doc__), argv)
    return refused or codes[-1]


def _resume(options: ResumeOptions) -> int:
    job = prepare.job_in(run_directory(options.run, options.runs_dir))
    os.chdir(job.cwd)  # where relative paths of the launcher's options begin
    launcher, part = prepare.launcher_in(job.folder)
    RunDirectory(job.directory).check(job.config)
    check_free(job)
    launcher.require()
    prepare.write(job, prepare.files_of(job, launcher, part))
    return launcher.submit(job)


if __name__ == "__main__":
    sys.exit(main())
