"""A sweep that Weights & Biases steers: `python -m launch.sweeps.wandb experiment=... key=interval(a,b) ...`.

Writes the sweep's description. `wandb sweep sweep.yaml` registers it, `wandb agent ENTITY/PROJECT/ID` on any machine
runs what W&B asks for: one launch a run, under a name made of its values. Words other than the options below are those
of `python -m launch`; keys with several values are searched.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from launch.__main__ import split_arguments
from launch.sweeps.run import compositions
from launch.sweeps.search import check_space
from trainer.commands import run_command
from trainer.composition import Axis, axes
from trainer.errors import ConfigError

METHODS = ("bayes", "random", "grid")
GOALS = ("minimize", "maximize")


@dataclass(frozen=True)
class SweepOptions:
    """method: bayes, random, grid; metric: of W&B's charts, by which runs are compared; goal: minimize, maximize; runs:
    at most; to: the file, null: standard output."""

    method: str = "bayes"
    metric: str = "eval/loss"
    goal: str = "minimize"
    runs: int | None = None
    to: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    names = {"--help", "-h", *(entry.name for entry in fields(SweepOptions))}
    own = [argument for argument in arguments if argument.partition("=")[0] in names]
    words = [argument for argument in arguments if argument.partition("=")[0] not in names]
    return run_command(SweepOptions, lambda options: write(options, words), str(__doc__), own)


def write(options: SweepOptions, words: Sequence[str]) -> None:
    """Write the description of the sweep. Raises ConfigError for what no agent could run."""
    text = yaml.safe_dump(description(options, words), sort_keys=False)
    if options.to is None:
        print(text, end="")
        return
    Path(options.to).write_text(text, encoding="utf-8")
    print(f"{options.to}: register it with: wandb sweep {options.to}")


def description(options: SweepOptions, words: Sequence[str]) -> dict[str, Any]:
    """W&B's sweep configuration. Raises ConfigError."""
    place = [word for word in words if word.startswith("launcher")]
    trained = split_arguments(words)[2]
    same, swept = axes(["-m", *trained])
    problems = [
        f"{key}={value} is not one of {', '.join(known)}."
        for key, value, known in (("method", options.method, METHODS), ("goal", options.goal, GOALS))
        if value not in known
    ]
    if options.method == "grid":
        problems += [f"{axis.key}: method=grid needs values, not an interval." for axis in swept if not axis.choices]
    if problems:
        raise ConfigError(*problems)
    check_space(same, swept)
    (member,) = compositions(same, [])
    sink = member.composed.logging.get("wandb")
    if sink is None:
        raise ConfigError("logging has no wandb, so W&B would hear nothing of the runs; use logging=[console,wandb].")
    return {
        "name": str(member.composed.name),
        "project": sink.project,
        **({"entity": sink.entity} if sink.entity else {}),
        "program": "launch",
        "method": options.method,
        "metric": {"name": options.metric, "goal": options.goal},
        **({"run_cap": options.runs} if options.runs else {}),
        "parameters": {axis.key: _parameter(axis) for axis in swept},
        "command": ["${env}", "python", "-m", "${program}", *place, *same, "${args_no_hyphens}"],
    }


def _parameter(axis: Axis) -> dict[str, Any]:
    if axis.choices:
        return {"values": [_typed(choice) for choice in axis.choices]}
    distribution: Literal["int_uniform", "log_uniform_values", "q_log_uniform_values", "uniform"]
    if axis.whole:
        distribution = "q_log_uniform_values" if axis.log else "int_uniform"
        step = {"q": 1} if axis.log else {}
        return {"distribution": distribution, "min": int(axis.low), "max": int(axis.high), **step}
    distribution = "log_uniform_values" if axis.log else "uniform"
    return {"distribution": distribution, "min": axis.low, "max": axis.high}


def _typed(choice: str) -> int | float | str:
    """A number as a number, so that W&B can compare it; anything else as one would type it."""
    for kind in (int, float):
        try:
            return kind(choice)
        except ValueError:
            continue
    return choice


if __name__ == "__main__":
    sys.exit(main())
