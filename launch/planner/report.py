"""What the planner found out, for people (tables with every formula) and for programs (JSON)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from launch.planner.found import Candidate, Failure, Found, arrangement
from trainer.config import Config, config_to_dict
from trainer.estimate import Cluster, Figure, Prediction, Term, shape_of

GIB = 2**30
_RUNNERS_UP = 8
"""The most that a table shows; --json has all."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A configuration on a cluster and what is predicted of it. tokens: a budget of positions; found: the search that
    chose it, which took `seconds`; command: trains by the experiment that was written."""

    config: Config
    cluster: Cluster
    prediction: Prediction
    tokens: float | None = None
    found: Found | None = None
    seconds: float = 0.0
    command: str | None = None


def show(plan: Plan, as_json: bool) -> None:
    """Print it."""
    if as_json:
        print(json.dumps(to_json(plan), indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 150)  # a file has room for a formula in a line
    for part in _parts(plan):
        console.print(part)


def header(plan: Plan, name: str) -> str:
    """What the file of the experiment `name` says about itself, as the shipped ones do."""
    prediction, cluster = plan.prediction, plan.cluster
    nodes = f"--nnodes={cluster.nodes} " if cluster.nodes > 1 else ""
    devices = f"{cluster.nodes} x {cluster.gpus_per_node} devices of {cluster.memory_gib:g} GiB"
    launcher = f"torchrun {nodes}--nproc_per_node={cluster.gpus_per_node}"
    return "\n".join(
        (
            f"{_candidate(plan).arrangement}, chosen by the planner as the fastest that fits.",
            "",
            f"command   {launcher} ... -m trainer --config-dir ... experiment={name}",
            f"hardware  {cluster.name}: {devices}",
            f"time      {_duration(_run_seconds(plan))} predicted, {_seconds(prediction.step_seconds)} a step",
            f"expected  {_gib(prediction.device_bytes)} GiB of device memory, {prediction.tokens_per_second:,.0f}"
            f" tokens/s, MFU {prediction.mfu:.1%}",
        )
    )


def _candidate(plan: Plan) -> Candidate:
    return Candidate(plan.config, plan.prediction)


def _run_seconds(plan: Plan) -> float:
    return plan.config.steps * plan.prediction.step_seconds.value


def _parts(plan: Plan) -> Iterator[RenderableType]:
    prediction = plan.prediction
    yield _what(plan)
    yield _terms("Device memory of a rank, at the peak of a step", prediction.memory, "GiB", GIB)
    if prediction.host:
        yield _terms("Host memory of a rank", prediction.host, "GiB", GIB)
    yield _terms("A step", prediction.step, "seconds", 1.0)
    yield _totals(plan)
    if plan.found is not None:
        yield from _search(plan.found, plan.seconds)
    if plan.command is not None:
        yield f"Train it: {plan.command}"


def _what(plan: Plan) -> Table:
    config, cluster, one = plan.config, plan.cluster, _candidate(plan)
    shape = shape_of(config)
    kind = config.model["_target_"].rpartition(".")[2]
    rows = {
        "model": f"{kind}, {shape.parameters:,} parameters, {config.precision}",
        "cluster": f"{cluster.name}: {cluster.nodes} x {cluster.gpus_per_node} devices of {cluster.memory_gib:g} GiB",
        "batch": f"{config.batch.global_size:,} samples a step, {one.micro} at once on a rank",
        "engine": f"{one.arrangement}; activations: {one.saving}",
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _terms(title: str, terms: Sequence[Term], unit: str, scale: float) -> Table:
    """Every term with its formula and what went into it; what runs beneath computation in a column of its own."""
    table = Table(title=title, title_justify="left", title_style="bold")
    hides = any(term.hidden for term in terms)
    sends = any(term.bytes_sent for term in terms)
    table.add_column("term")
    table.add_column(unit, justify="right")
    if hides:
        table.add_column("hidden", justify="right")
    if sends:
        table.add_column("sent over", justify="right")
    table.add_column("formula")
    table.add_column("of")
    for term in terms:
        row = [term.name, _number(term.value / scale)]
        row += [_number(term.hidden) if term.hidden else ""] if hides else []
        row += [f"{term.bytes_sent / GIB:,.1f} GiB {term.link}" if term.bytes_sent else ""] if sends else []
        table.add_row(*row, term.formula, ", ".join(f"{name} {_short(value)}" for name, value in term.inputs.items()))
    return table


def _totals(plan: Plan) -> Table:
    """The totals with their error bars, and what follows from them."""
    prediction, config = plan.prediction, plan.config
    verdict = "fits" if prediction.surely_fits else "fits, if nothing is lost" if prediction.fits else "DOES NOT FIT"
    capacity, host = prediction.capacity / GIB, prediction.host_capacity / GIB
    rows = {
        "device memory": f"{_gib(prediction.device_bytes)} of {capacity:,.1f} GiB: {verdict}",
        "host memory": f"{_gib(prediction.host_bytes)} of {host:,.1f} GiB a device",
        "step": f"{_seconds(prediction.step_seconds)}",
        "tokens/s": f"{prediction.tokens_per_second:,.0f} ({prediction.tokens_per_second / prediction.ranks:,.0f} a"
        " device), positions of source and target",
        "MFU": f"{prediction.mfu:.1%} of {prediction.peak_flops / 1e12:,.4g} TFLOP/s",
        f"{config.steps:,} steps": _time_and_cost(plan, config.steps * prediction.positions),
    }
    if plan.tokens is not None:
        rows[f"{_short(plan.tokens)} tokens"] = _time_and_cost(plan, plan.tokens)
    rows["checkpoint"] = (
        f"{prediction.checkpoint_bytes / GIB:,.1f} GiB, {prediction.checkpoint_seconds:,.1f} s to write"
    )
    table = Table(title="In all (9 of 10 published measurements lie within the ranges)", title_justify="left")
    table.add_column("")
    table.add_column("predicted")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _time_and_cost(plan: Plan, tokens: float) -> str:
    prediction = plan.prediction
    cost = prediction.cost_to(tokens)
    devices = prediction.seconds_to(tokens) / 3600 * prediction.ranks
    paid = "" if cost is None else f", costs {cost:,.0f} at {prediction.price_per_hour:g} a device and hour"
    return f"{_duration(prediction.seconds_to(tokens))}, {devices:,.0f} device hours{paid}"


def _search(found: Found, seconds: float) -> Iterator[RenderableType]:
    """The choice, the runners-up and the failures."""
    yield f"\nChosen of {found.tried:,} predictions in {seconds:.1f} s" + (
        "; the upper end of its error bar does not fit" if found.narrowly else ""
    )
    table = Table(title="Fastest of each arrangement", title_justify="left", title_style="bold")
    for name in ("", "arrangement", "activations", "at once"):
        table.add_column(name)
    for name in ("seconds", "MFU", "GiB"):
        table.add_column(name, justify="right")
    for place, one in enumerate((found.best, *found.runners_up[:_RUNNERS_UP]), start=1):
        figures = f"{one.prediction.step_seconds.value:.3g}", f"{one.prediction.mfu:.1%}"
        gib = f"{one.prediction.device_bytes.value / GIB:,.1f}"
        table.add_row(str(place), one.arrangement, one.saving, one.micro, *figures, gib)
    yield table
    if len(found.runners_up) > _RUNNERS_UP:
        yield f"and {len(found.runners_up) - _RUNNERS_UP} slower"
    table = Table(title="What does not do (the closest of each kind)", title_justify="left", title_style="bold")
    table.add_column("arrangement")
    table.add_column("why")
    closest: dict[str, Failure] = {}
    for failure in sorted(found.failures, key=lambda one: one.excess):
        closest.setdefault(failure.family, failure)
    for failure in closest.values():
        table.add_row(arrangement(failure.engine), failure.reason)
    if closest:
        yield table
    if len(found.failures) > len(closest):
        yield f"and {len(found.failures) - len(closest)} more"


def to_json(plan: Plan) -> dict[str, Any]:
    """All figures, bytes and seconds, by name."""
    prediction = plan.prediction
    found = None
    if plan.found is not None:
        found = {
            "seconds": plan.seconds,
            "tried": plan.found.tried,
            "narrowly": plan.found.narrowly,
            "best": _row(plan.found.best),
            "runners_up": [_row(one) for one in plan.found.runners_up],
            "failures": [_failure(failure) for failure in plan.found.failures],
        }
    budgets = {"run": plan.config.steps * prediction.positions, "tokens": plan.tokens}
    return {
        "cluster": {**asdict(plan.cluster), "peak_flops": dict(plan.cluster.peak_flops)},
        "parameters": shape_of(plan.config).parameters,
        "engine": config_to_dict(plan.config)["engine"],
        "batch": config_to_dict(plan.config)["batch"],
        "memory": [_term(term) for term in prediction.memory],
        "host": [_term(term) for term in prediction.host],
        "step": [_term(term) for term in prediction.step],
        "device_bytes": asdict(prediction.device_bytes),
        "host_bytes": asdict(prediction.host_bytes),
        "step_seconds": asdict(prediction.step_seconds),
        "capacity": prediction.capacity,
        "host_capacity": prediction.host_capacity,
        "fits": prediction.fits,
        "surely_fits": prediction.surely_fits,
        "tokens_per_second": prediction.tokens_per_second,
        "mfu": prediction.mfu,
        "checkpoint_bytes": prediction.checkpoint_bytes,
        "checkpoint_seconds": prediction.checkpoint_seconds,
        "budgets": {
            name: {"tokens": tokens, "seconds": prediction.seconds_to(tokens), "cost": prediction.cost_to(tokens)}
            for name, tokens in budgets.items()
            if tokens is not None
        },
        "search": found,
        "command": plan.command,
    }


def _term(term: Term) -> dict[str, Any]:
    return {**asdict(term), "inputs": dict(term.inputs)}


def _failure(failure: Failure) -> dict[str, Any]:
    excess = failure.excess if failure.excess < float("inf") else None
    return {"arrangement": arrangement(failure.engine), "reason": failure.reason, "excess": excess}


def _row(one: Candidate) -> dict[str, Any]:
    config: Mapping[str, Any] = config_to_dict(one.config)
    return {
        "arrangement": arrangement(one.config.engine),
        "engine": config["engine"],
        "batch": config["batch"],
        "step_seconds": one.prediction.step_seconds.value,
        "mfu": one.prediction.mfu,
        "device_bytes": one.prediction.device_bytes.value,
    }


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:,.3f}" if value < 10 else f"{value:,.1f}"


def _short(value: float) -> str:
    """Few digits, in powers of ten where it is large."""
    return f"{value:,.6g}" if abs(value) < 1e6 else f"{value:.4g}"


def _gib(figure: Figure) -> str:
    return f"{figure.value / GIB:,.1f} ({figure.low / GIB:,.1f} to {figure.high / GIB:,.1f})"


def _seconds(figure: Figure) -> str:
    return f"{figure.value:.3g} s ({figure.low:.3g} to {figure.high:.3g})"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:,.1f} hours" if seconds < 72 * 3600 else f"{seconds / 86400:,.1f} days"
