"""The predictions beside published measurements: `python -m launch.planner.validate`.

Half of the rows (by the hash of their configuration) fit the numbers of `trainer.estimate.fitted`; errors are told of
each half, of memory and time apart, and whether what was measured is said to fit. --write renews docs/planner_errors.md
and its plot, --fit fits again and prints the numbers, --leave-out fits without each source in turn.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from launch.planner import states
from launch.planner.published import Row, rows
from trainer.estimate.fitted import FITTED, Fitted
from trainer.estimate.predict import predict

DOCS = Path(__file__).resolve().parents[2] / "docs"

EXPECTED = {
    "products volta": 0.75, "products ampere": 0.80, "products hopper": 0.75, "products hopper early": 0.60,
    "bandwidth": 0.80, "eager": 1.5, "attention flash1 ampere": 0.35, "attention flash1 hopper": 0.20,
    "attention flash ampere": 0.55, "attention flash hopper": 0.40, "exposed": 0.25, "hop_seconds": 5e-6,
}  # fmt: skip
"""What is fitted of the time, and what kernels' own benchmarks let one expect of it; the fit is drawn there."""

EXPECTED_WITHIN, EXPECTED_WEIGHT = 0.25, 0.002
"""How far from it (of the logarithm) is one unit of the penalty, and how much that counts beside the mean error."""

LARGEST_COUNTED = 0.5
"""Error (of the logarithm) above which a row does not count more: runs short of memory, or odd ones."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A row, what is predicted in its unit, and by how much that is off: of memory and throughput, predicted /
    published - 1."""

    row: Row
    predicted: float
    error: float
    memory_share: float
    """Predicted memory / what a process can have of the device."""


def compare(row: Row, fitted: Fitted = FITTED) -> Compared:
    """`row` beside the prediction."""
    made = predict(row.shape, row.layout, row.cluster, fitted)
    share = made.device_bytes.value / made.capacity
    if row.unit in ("GiB", "fits"):
        predicted = made.device_bytes.value / 2**30
        return Compared(row, predicted, predicted / row.value - 1 if row.unit == "GiB" else 0.0, share)
    if row.unit == "s":
        return Compared(row, made.step_seconds.value, row.value / made.step_seconds.value - 1, share)
    predicted = made.tokens_per_second / row.layout.ranks
    return Compared(row, predicted, predicted / row.value - 1, share)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of `values` lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def is_time(row: Row) -> bool:
    """Whether a row tells a throughput or a step's seconds."""
    return row.unit in ("s", "tokens/s/gpu")


def wrongly_placed(compared: Sequence[Compared]) -> list[Compared]:
    """Rows that ran and are said not to fit, and those that ran out of memory and are said to."""
    return [one for one in compared if (one.memory_share <= 1) == (one.row.unit == "fits" and one.row.value == 0)]


def summary(compared: Sequence[Compared]) -> str:
    """Medians and 90th percentiles of the absolute errors of each half; the error bars; what fits."""
    lines = []
    for what, chosen in (("memory", lambda row: row.unit == "GiB"), ("time", is_time)):
        for half, fitted in (("fitted on", True), ("held out", False)):
            found = [one for one in compared if chosen(one.row) and one.row.fitted is fitted]
            errors = [abs(one.error) for one in found]
            lines.append(
                f"{what:6}  {half:9}  {len(errors):4} rows   median {median(errors):6.1%}   90th percentile"
                f" {quantile(errors, 0.9):6.1%}   worst {max(errors):6.1%}"
            )
        held_out = [one for one in compared if chosen(one.row) and not one.row.fitted]
        ratios = [1 / (1 + one.error) if what == "memory" else 1 + one.error for one in held_out]
        bar = f"{quantile(ratios, 0.05):.2f} to {quantile(ratios, 0.95):.2f}"
        lines.append(f"{what:6}  9 of 10 measured values held out are {bar} times the predicted")
    wrong = wrongly_placed(compared)
    out = sum(one.row.unit == "fits" and one.row.value == 0 for one in compared)
    lines.append(
        f"fits    {len(compared) - out} configurations ran and {out} ran out of memory; {len(wrong)} told wrongly"
    )
    return "\n".join(lines)


def table(compared: Sequence[Compared]) -> str:
    """Every row in Markdown, by source."""
    by_source: dict[str, list[Compared]] = defaultdict(list)
    for one in compared:
        by_source[one.row.source].append(one)
    lines = []
    for source, found in by_source.items():
        lines += [f"## {source}", "", "| configuration | half | unit | published | predicted | error |"]
        lines.append("|---|---|---|---|---|---|")
        for one in found:
            row, half = one.row, "fitted" if one.row.fitted else "held out"
            if row.unit == "fits":
                fits = "fits" if one.memory_share <= 1 else "does not fit"
                cells = "memory", "ran" if row.value else "out of memory", f"{one.predicted:.1f} GiB: {fits}", ""
            else:
                error = f"{one.error:+.1%}"
                cells = row.unit, f"{row.value:.4g}", f"{one.predicted:.4g}", error
            lines.append(f"| {row.name} | {half} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plot(compared: Sequence[Compared], path: Path) -> None:
    """Predicted against published, memory and throughput, the two halves told apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5.5))
    panels: tuple[tuple[str, Callable[[Row], bool]], ...] = (
        ("memory of a device, GiB", lambda row: row.unit == "GiB"),
        ("throughput, relative to published", is_time),
    )
    for axis, (title, chosen) in zip(axes, panels, strict=True):
        for fitted, marker, label in ((True, "o", "fitted on"), (False, "x", "held out")):
            found = [one for one in compared if chosen(one.row) and one.row.fitted is fitted]
            if title.startswith("memory"):
                axis.plot([one.row.value for one in found], [one.predicted for one in found], marker, ms=5, label=label)
            else:
                ranks = [one.row.layout.ranks * (1.06 if fitted else 1) for one in found]
                axis.plot(ranks, [1 + one.error for one in found], marker, ms=4, label=label)
        axis.set_title(title)
        axis.legend()
        axis.grid(alpha=0.3)
    low, high = 15, 135
    axes[0].plot([low, high], [low, high], "k-", lw=0.8)
    axes[0].fill_between([low, high], [low * 0.92, high * 0.92], [low * 1.08, high * 1.08], alpha=0.15, color="grey")
    axes[0].set(xlabel="published", ylabel="predicted")
    axes[1].axhspan(0.9, 1.1, alpha=0.15, color="grey")
    axes[1].axhline(1.0, color="k", lw=0.8)
    axes[1].set(xlabel="devices", ylabel="predicted / published", xscale="log")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _get(fitted: Fitted, name: str) -> float:
    group, _, key = name.partition(" ")
    value = getattr(fitted, group)
    return float(value[key] if key else value)


def _put(fitted: Fitted, name: str, value: float) -> Fitted:
    group, _, key = name.partition(" ")
    changed = {**getattr(fitted, group), key: value} if key else value
    return replace(fitted, **{group: changed})  # type: ignore[arg-type]


def cost(fitted: Fitted, chosen: Sequence[Row]) -> float:
    """Mean absolute error of the logarithm, a source by the root of its rows, and how far from the expected it is."""
    by_source: dict[str, list[float]] = defaultdict(list)
    for row in chosen:
        by_source[row.source].append(min(abs(math.log(1 + compare(row, fitted).error)), LARGEST_COUNTED))
    weights = {source: math.sqrt(len(errors)) for source, errors in by_source.items()}
    mean = sum(weights[source] * sum(errors) / len(errors) for source, errors in by_source.items())
    far = sum((math.log(_get(fitted, name) / value) / EXPECTED_WITHIN) ** 2 for name, value in EXPECTED.items())
    return mean / sum(weights.values()) + EXPECTED_WEIGHT * far


def fit(chosen: Sequence[Row], tell: Callable[[str], object] = print) -> Fitted:
    """The numbers of `EXPECTED`, fitted one after the other in steps that become smaller."""
    best = FITTED
    for name, value in EXPECTED.items():
        best = _put(best, name, value)
    lowest, step = cost(best, chosen), 0.2
    while step > 0.01:
        better = False
        for name in EXPECTED:
            for factor in (math.exp(step), math.exp(-step)):
                tried = _put(best, name, _get(best, name) * factor)
                found = cost(tried, chosen)
                if found < lowest - 1e-6:
                    best, lowest, better = tried, found, True
                    break
        tell(f"step {step:.3f}: {lowest:.5f}")
        step = step if better else step / 2
    return best


def left_out(published: Sequence[Row]) -> str:
    """Errors of the throughputs of each source, with the numbers fitted on all others: what a new source may expect."""
    chosen = [row for row in published if is_time(row)]
    lines = []
    for source in dict.fromkeys(row.source for row in chosen):
        found = fit([row for row in chosen if row.fitted and row.source != source], tell=lambda _: None)
        errors = [abs(compare(row, found).error) for row in chosen if row.source == source]
        numbers = f"{len(errors):4} rows   median {median(errors):6.1%}   90th percentile {quantile(errors, 0.9):6.1%}"
        lines.append(f"{numbers}   {source}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 where an error is beyond what docs/planner.md promises."""
    parser = argparse.ArgumentParser(prog="python -m launch.planner.validate", description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew docs/planner_errors.md and docs/planner_errors.png")
    parser.add_argument(
        "--fit", action="store_true", help="fit on the one half again, and print the numbers (a minute)"
    )
    parser.add_argument("--leave-out", action="store_true", help="fit without each source in turn (some minutes)")
    options = parser.parse_args(arguments)
    published, fitted = list(rows()), FITTED
    if options.leave_out:
        print(left_out(published))
        return 0
    if options.fit:
        fitted = fit([row for row in published if row.fitted and is_time(row)])
        print("\n".join(f"{name:26} {_get(fitted, name):.4g}" for name in EXPECTED))
    compared = [compare(row, fitted) for row in published]
    print(summary(compared))
    if options.write:
        head = (
            "# Every published figure beside its prediction\n\nWritten by `python -m launch.planner.validate --write`."
        )
        note = "Error: predicted / published - 1 of memory and throughput; of seconds, published / predicted - 1."
        text = f"{head} {note}\n\n![predicted and published](planner_errors.png)\n\n```\n{summary(compared)}\n```\n\n"
        (DOCS / "planner_errors.md").write_text(text + table(compared) + states.table(), encoding="utf-8")
        plot(compared, DOCS / "planner_errors.png")
    return 1 if wrongly_placed(compared) else 0


if __name__ == "__main__":
    sys.exit(main())
