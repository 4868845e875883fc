"""`python -m launch.planner`: whether an experiment fits a cluster, how long it takes, and what would be faster."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands import run_command
from trainer.errors import ConfigError
from trainer.wording import did_you_mean

if TYPE_CHECKING:
    from trainer.config import Config
    from trainer.estimate import Cluster, Prediction

USAGE = """
python -m launch.planner cluster=h100_8x8 [group=choice ...] [key=value ...]

What a run of the trainer would take on a cluster, before it is paid for: memory of a rank and seconds of a step, term
by term with formulas, and from them tokens a second, MFU, time, cost and checkpoints.

  python -m launch.planner experiment=decoder_7b_zero3 cluster=h100_8x8
  python -m launch.planner experiment=decoder_70b_zero3 cluster=h100_128x8 tokens=15e12 price=2.5
  python -m launch.planner experiment=decoder_7b_zero3 cluster=a100_40gb_2x8 choose=true write=mine/experiment/fast.yaml

All other words are the trainer's own: experiment=..., model=..., batch.global_size=..., --config-dir DIR.
"""


@dataclass(frozen=True, slots=True)
class Options:
    """cluster: a file in configs/cluster with nodes x devices of each, or a YAML file of your own; tokens: to be
    trained on, counted as positions; price: of a device and hour; choose: search the fastest settings that fit; write:
    the experiment they make, DIR/experiment/NAME.yaml (and choose); json: print figures for programs."""

    cluster: str
    tokens: float | None = None
    price: float | None = None
    choose: bool = False
    write: str | None = None
    json: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    own, words, folder = _divided(list(sys.argv[1:] if argv is None else argv))
    return run_command(Options, partial(_plan, words=words, folder=folder), USAGE, own)


def _divided(arguments: list[str]) -> tuple[list[str], list[str], str | None]:
    """The planner's own words, the trainer's, and the folder of --config-dir."""
    known = {field.name for field in fields(Options)}
    own, words, folder = [], [], None
    rest = iter(arguments)
    for word in rest:
        key, equals, value = word.partition("=")
        if key in ("--config-dir", "-cd"):
            folder = value if equals else next(rest, "")
        elif word == "--json":
            own.append("json=true")
        elif key in known or word.startswith("-") or word == "debug.traceback=true":
            own.append(word)
        else:
            words.append(word)
    return own, words, folder


def _plan(options: Options, words: list[str], folder: str | None) -> None:
    from trainer.estimate import load_cluster

    problems = [
        f"{key}={value:g} is not above 0."
        for key, value in (("tokens", options.tokens), ("price", options.price))
        if value is not None and not 0 < value < float("inf")
    ]
    if problems:
        raise ConfigError(*problems)
    cluster = load_cluster(options.cluster)
    if options.price is not None:
        cluster = replace(cluster, price_per_hour=options.price)
    config = _composed(words, folder)

    from launch.planner.experiment import write_experiment  # with torch: after what can be refused without
    from launch.planner.report import Plan, header, show
    from launch.planner.search import choose

    began = time.perf_counter()
    if not options.choose and options.write is None:
        plan = Plan(config, cluster, _predicted(config, cluster), options.tokens)
        show(plan, options.json)
        if not plan.prediction.fits:
            best = choose(config, cluster).best  # or what says that nothing fits
            raise ConfigError(
                f"This does not fit as it is configured. {best.arrangement} with {best.micro} at once and activations"
                f" {best.saving} does: choose=true shows it, and write=FILE makes an experiment of it."
            )
        return
    found = choose(config, cluster)
    plan = Plan(found.best.config, cluster, found.best.prediction, options.tokens, found)
    plan = replace(plan, seconds=time.perf_counter() - began)
    if options.write is not None:
        path = Path(options.write)
        plan = replace(plan, command=write_experiment(path, words, plan.config, header(plan, path.stem)))
    show(plan, options.json)


def _composed(words: list[str], folder: str | None) -> Config:
    """The configuration that the trainer would run. Raises ConfigError with everything that is wrong with it."""
    from trainer.build import part_problems
    from trainer.composition import compose, search_path
    from trainer.config import to_config

    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"--config-dir {folder} is no folder.")
    try:
        return to_config(compose(words if folder is None else [search_path(folder), *words]), part_problems)
    except ConfigError as error:
        own = [field.name for field in fields(Options)]
        hints = {word: did_you_mean(word.partition("=")[0], own) for word in words}
        near = [f"{word}, of the planner's own keys{hint}" for word, hint in hints.items() if hint != "."]
        raise ConfigError(*error.problems, *near) from error


def _predicted(config: Config, cluster: Cluster) -> Prediction:
    """Of the configuration as it is, on all of the cluster. Raises ConfigError where it cannot be split so."""
    from trainer.build import build
    from trainer.estimate import layout_of, predict, shape_of
    from trainer.estimate.reading import check_shape
    from trainer.parallel.split import check_split
    from trainer.plan import make_plan

    plan, shape = make_plan(config, cluster.ranks), shape_of(config)
    if plan.sequence_parallel * plan.tensor_parallel > 1:
        check_split(partial(build, config.model, "model"), plan)
    check_shape(shape, config)
    return predict(shape, layout_of(config, cluster.ranks), cluster)


if __name__ == "__main__":
    sys.exit(main())
