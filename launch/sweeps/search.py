"""A search by Optuna: each run's values are sampled with a view to how the runs before it came out.

The first run is the experiment as it stands. It says which metric is the headline of the task, and what the search has
to beat. What has been tried is kept in the sweep's folder, so the same command goes on with the search; with more
`trials` it goes further.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from launch.sweeps.results import Row
from launch.sweeps.run import Member, One, compositions, row_of, run, wait
from trainer.composition import Axis
from trainer.errors import ConfigError, SetupError

if TYPE_CHECKING:
    import optuna

HISTORY = "optuna.log"


def search(one: One, same: Sequence[str], swept: Sequence[Axis], trials: int, folder: Path) -> list[Row]:
    """Run the experiment, then sampled values of the keys, `trials` runs in all; those of earlier calls count.

    same: the words that all runs have, -m among them. Raises ConfigError where there is nothing to search, the space is
    impossible or nothing is evaluated on the validation split, SetupError without the extra [sweep].
    """
    try:
        import optuna
    except ImportError as error:
        raise SetupError("sweep=optuna needs optuna, which is not installed: install shardwright[sweep].") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if trials < 2:
        raise ConfigError(f"trials={trials} leaves nothing to search: the first run is the experiment as it stands.")
    check_space(same, swept)
    (baseline,) = compositions(same, [])
    own = {axis.key: str(OmegaConf.select(baseline.composed, axis.key.lstrip("+"), default="")) for axis in swept}
    rows = [_measured(one, replace(baseline, values=own))]
    if rows[0].state != "finished":
        print(f"sweep: the experiment itself is {rows[0].state}; nothing is searched.", flush=True)
        return rows
    if rows[0].value is None:
        raise ConfigError(
            f"{rows[0].name} evaluated nothing on the validation split, by which runs are compared;"
            " add eval.every=STEPS or eval.final_split=validation."
        )
    study = _study(folder, int(baseline.composed.seed), rows[0].more_is_better)
    spaces = {axis.key: _distribution(axis) for axis in swept}
    while len(rows) < trials and rows[-1].state != "preempted":
        if (number := len(rows) - 1) == len(study.trials):
            study.ask(spaces)
        trial = study.trials[number]  # of an earlier call, or new
        values = {axis.key: _text(trial.params[axis.key]) for axis in swept}
        (member,) = compositions([*same, *map("=".join, values.items())], list(values))
        print(f"sweep: run {len(rows) + 1} of {trials}: {member.composed.name}", flush=True)
        row = _measured(one, member)
        rows.append(row)
        if trial.state == optuna.trial.TrialState.RUNNING and row.state != "preempted":  # that one goes on later
            good = row.value is not None and math.isfinite(row.value)
            study.tell(number, **({"values": row.value} if good else {"state": optuna.trial.TrialState.FAIL}))
    return rows


def check_space(same: Sequence[str], swept: Sequence[Axis]) -> None:
    """Refuse, with every problem, keys and intervals that no run could take. Raises ConfigError."""
    problems = [
        f"{axis.key}: an interval on a logarithmic scale begins above 0, not at {axis.low:g}."
        for axis in swept
        if axis.log and axis.low <= 0
    ] + [
        f"{axis.key}: an interval goes from the lower to the higher number, not from {axis.low:g} to {axis.high:g}."
        for axis in swept
        if not axis.choices and axis.low > axis.high
    ]
    if not swept:
        problems.append("There is no key to search; write key=interval(a,b), key=choice(a,b) or key=a,b.")
    if problems:
        raise ConfigError(*problems)
    # A key that does not exist is refused here, before anything runs.
    compositions([*same, *(f"{axis.key}={axis.choices[0] if axis.choices else axis.low}" for axis in swept)], [])


def _measured(one: One, member: Member) -> Row:
    """Run it to its end, wherever it runs."""
    row = run(one, member)
    if row.state == "submitted":
        wait(member)
        row = row_of(member, "failed")
    return row


def _study(folder: Path, seed: int, more_is_better: bool) -> optuna.Study:
    """The search so far."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=folder.name,
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(folder / HISTORY))),
        direction="maximize" if more_is_better else "minimize",
        load_if_exists=True,
    )
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))  # else it would repeat its first samples
    return study


def _distribution(axis: Axis) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.choices:
        return CategoricalDistribution(axis.choices)
    if axis.whole:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def _text(value: object) -> str:
    """A value as one would type it; a number so that reading it gives the same number."""
    return value if isinstance(value, str) else repr(value)
