"""The data of an experiment without training: `python -m trainer.inspect experiment=quickstart [n=5] [key=value ...]`.

Shows sources, records, encoded samples, the first rows of the stream, lengths, and what a pass over the train split
holds. All arguments but the options below are those of `python -m trainer`: data.batching=packed, data.path=... The
tokenizer is made as training would make it, or taken from the run of that name. No model is built, and nothing is
written but png. Padding is that of a single rank.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands import run_command
from trainer.config import Config, to_config
from trainer.errors import ConfigError, SetupError
from trainer.wording import did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class InspectOptions:
    """Arguments of `python -m trainer.inspect` beside those of `python -m trainer`.

    n: records, samples and rows to show; png: where to draw the lengths; max_records: to read of each source, None =
    all; max_steps: steps whose padding is counted, at most an epoch; json: the figures as one JSON object.
    """

    n: int = 5
    png: str | None = None
    max_records: int | None = None
    max_steps: int = 200
    json: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    own, rest = split_arguments(sys.argv[1:] if argv is None else argv)
    return run_command(InspectOptions, lambda options: _inspect(options, rest), str(__doc__), own)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """This command's own arguments, misspelt ones among them, and those for Hydra."""
    options = [entry.name for entry in fields(InspectOptions)]
    config = [*(entry.name for entry in fields(Config)), "experiment"]
    suggestions = {f"; did you mean {option}?" for option in options}

    def is_own(argument: str) -> bool:
        key = argument.partition("=")[0]
        if key in options or argument in ("--help", "-h", "debug.traceback=true"):
            return True
        misspelt = key.isidentifier() and key not in config and did_you_mean(key, [*options, *config])
        return misspelt in suggestions

    own = [argument for argument in arguments if is_own(argument)]
    return own, [argument for argument in arguments if not is_own(argument)]


def _inspect(options: InspectOptions, overrides: Sequence[str]) -> None:
    _check(options, overrides)
    from trainer.build import part_problems
    from trainer.composition import execute

    def job(composed: DictConfig, _: list[str]) -> int:
        config = to_config(composed, part_problems)
        from trainer.inspect.gather import gather
        from trainer.inspect.show import draw, show

        figures = gather(config, options.n, options.max_records, options.max_steps)
        if options.png is not None:
            draw(figures, options.png)
        if options.json:
            print(json.dumps(asdict(figures), ensure_ascii=False, default=_plain))
        else:
            show(figures)
        return 0

    execute(job, overrides)


def _plain(value: object) -> object:
    """A value of a record that JSON does not know: an array as a list, anything else in words."""
    to_list = getattr(value, "tolist", None)
    return str(value) if to_list is None else to_list()


def _check(options: InspectOptions, overrides: Sequence[str]) -> None:
    """Refuse, before anything is read, what cannot be done in the end."""
    numbers = {"n": options.n, "max_records": options.max_records, "max_steps": options.max_steps}
    problems = [
        f"{key}={value} must be at least 1." for key, value in numbers.items() if value is not None and value < 1
    ]
    if {"-m", "--multirun"} & set(overrides):
        problems.append("--multirun: one configuration is looked at at a time; leave it out.")
    if options.png is not None:
        path = Path(options.png)
        if path.suffix.lower() != ".png":
            problems.append(f"png={options.png} must be a file name that ends in .png.")
        elif not path.absolute().parent.is_dir():
            problems.append(f"png={options.png}: there is no folder {path.parent}; create it.")
    if problems:
        raise ConfigError(*problems)
    if options.png is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise SetupError(
                f"png={options.png} needs the package matplotlib: pip install shardwright[plots]."
            ) from error


if __name__ == "__main__":
    sys.exit(main())
