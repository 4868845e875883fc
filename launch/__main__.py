"""The same experiment, launched: `python -m launch launcher=local|deepspeed|slurm|... experiment=... [key=value ...]`.

launcher=NAME launcher.key=value choose where and how (docs/launch.md); all other words are those of the trainer.
What will be done is written to runs/NAME/launch/ first; dry_run=true prints it and stops there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from trainer.commands import run_command
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.wording import did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class LaunchOptions:
    """Arguments of `python -m launch` beside those of a launcher and of the trainer.

    dry_run: write and print what would be done, and stop; sweep: of the values that -m has, `grid` for all of them, or
    `optuna` for `trials` that it finds promising.
    """

    dry_run: bool = False
    sweep: str = "grid"
    trials: int = 20


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    own, place, words = split_arguments(sys.argv[1:] if argv is None else argv)
    codes = [0]
    refused = run_command(LaunchOptions, lambda options: codes.append(launch(options, place, words)), str(__doc__), own)
    return refused or codes[-1]


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Words for this command, for the launcher (a misspelt `launcher` among them), and for the trainer. --config-dir is
    for both of them: it may hold launchers, too."""
    keys, own = [entry.name for entry in fields(Config)], [entry.name for entry in fields(LaunchOptions)]
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.startswith("--config-dir"):
            parts[1].extend([argument] if "=" in argument else [argument, after])
        key = argument.partition("=")[0].lstrip("+~")
        first = key.partition(".")[0]
        misspelt = first not in keys and did_you_mean(first, ["launcher", *keys]) == "; did you mean launcher?"
        if key in own or argument in ("--help", "-h", "debug.traceback=true"):
            parts[0].append(argument)
        else:
            parts[1 if first == "launcher" or misspelt else 2].append(argument)
    return parts


def launch(options: LaunchOptions, place: Sequence[str], words: Sequence[str]) -> int:
    """Launch what `words` compose (with -m, each of it) as the launcher's words `place` say; returns an exit code."""
    from launch import prepare, runs
    from trainer.composition import execute

    launcher, part = prepare.make_launcher(place)

    def one(composed: DictConfig, overrides: list[str]) -> int:
        job = prepare.make_job(composed, overrides, launcher)
        runs.check_free(job)
        files = prepare.files_of(job, launcher, part)
        if not options.dry_run:
            launcher.require()
        prepare.write(job, files)
        print(f"{job.folder}: {', '.join(sorted(files))}", flush=True)
        if options.dry_run:
            print(*(f"\n== {name}\n{text}" for name, text in launcher.render(job).items()), sep="")
            return 0
        return launcher.submit(job)

    many = bool({"-m", "--multirun"} & set(words))
    if options.sweep != "grid" and (options.dry_run or not many):
        cure = (
            "a search finds its runs as it goes; leave dry_run out."
            if many
            else "add -m, and keys to search: key=interval(a,b)."
        )
        raise ConfigError(f"sweep={options.sweep}: {cure}")
    if many and not options.dry_run:
        from launch.sweeps.run import run_sweep

        return run_sweep(one, words, options.sweep, options.trials)
    return execute(one, words)


if __name__ == "__main__":
    sys.exit(main())
