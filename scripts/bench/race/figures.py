"""From events to figures, a table and a picture."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from race.running import Runner

OURS = "shardwright"
PAIRS_ONLY = ("hf_grouped", "joeynmt", "eole")
"""Entrants that packed rows say nothing about: they group pairs by length, or translate and do nothing else."""

ONE_RANK_ONLY = ("joeynmt", "eole")
"""Entrants that have no data parallelism on a CPU."""

Heats = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""By title of the heat and entrant."""


def takes_part(entrant: str, kind: str, ranks: int) -> bool:
    """Whether the entrant has anything to show in laps of this kind on so many ranks."""
    return (kind == "pairs" or entrant not in PAIRS_ONLY) and (ranks == 1 or entrant not in ONE_RANK_ONLY)


def of_turns(runner: Runner, memory: int) -> dict[str, Any]:
    """The figures of an entrant's run in turns; `memory`: peak bytes of its largest process."""
    ranks = runner.everything()
    tokens: dict[int, int] = defaultdict(int)
    for events in ranks:
        for event in events:
            if event["event"] == "step":
                tokens[event["step"]] += event["target_tokens"]
    time_of = {event["step"]: event["time"] for event in ranks[0] if event["event"] == "step"}
    rates, seconds = [], []
    for first, last, spent in runner.turns:
        rates.append(sum(tokens[step] for step in range(first + 1, last + 1)) / spent)
        seconds += [time_of[step] - time_of[step - 1] for step in range(first + 1, last + 1)]
    turned = [step for first, last, _ in runner.turns for step in range(first, last + 1)]
    padding = [e["padding"] for e in ranks[0] if e["event"] == "step" and e.get("padding") is not None]
    ready = next((event for event in ranks[0] if event["event"] == "ready"), {})
    return {
        "rates": rates,
        "tokens_per_second": statistics.median(rates),
        "tokens_per_processor_second": sum(tokens[step] for step in turned) / runner.processor_seconds,
        "step_seconds": statistics.median(seconds),
        "jitter": sorted(seconds)[int(0.95 * len(seconds))] / statistics.median(seconds),
        "tokens_per_step": statistics.mean(tokens[step] for step in turned),
        "steps": len(seconds),
        "padding": statistics.mean(padding) if padding else None,
        "memory_bytes": memory,
        "start_seconds": min(time_of.values()) - runner.launched,
        "parameters_more": ready.get("parameters", runner.spec["parameters"]) - runner.spec["parameters"],
    }


def of_saving(runner: Runner) -> dict[str, Any]:
    """Of a run that saves once: bytes of the checkpoint, seconds from the end of its step until it was on the disk, and
    seconds that training stood still: ours goes on while a thread writes, so how much longer the next step took than
    the median one."""
    events = runner.everything()[0]
    saved = next((event for event in events if event["event"] == "saved"), None)
    if saved is None:
        return {}
    times = {event["step"]: event["time"] for event in events if event["event"] == "step"}
    spent = {step: times[step] - times[step - 1] for step in times if step - 1 in times}
    seconds = stall = saved["time"] - times[saved["step"]]
    if runner.spec["entrant"] == OURS:
        after = spent.pop(saved["step"] + 1)
        stall = max(after - statistics.median(spent.values()), 0.0)
    return {"checkpoint_bytes": saved["bytes"], "checkpoint_seconds": seconds, "checkpoint_stall_seconds": stall}


def ratios(heat: Mapping[str, Mapping[str, Any]], other: str) -> list[float]:
    """Our tokens per second over `other`'s, round by round."""
    return [ours / theirs for ours, theirs in zip(heat[OURS]["rates"], heat[other]["rates"], strict=True)]


def shares_of_peak(spec: dict[str, Any], heat: Mapping[str, Mapping[str, Any]]) -> list[float]:
    """Our model FLOPs a second (the model's `flops_per_sample`; padding is none) over those of `matmul`, by rounds."""
    import torch

    from race import bare, shardwright

    with torch.device("meta"):
        model = bare.shape_of(spec)
    if spec["kind"] == "packed":
        rows, sides = spec["batch"], {"target_length": spec["max_length"]}
    else:
        rows, (source, target) = shardwright.packed_rows({**spec, "ranks": 1})
        sides = {"source_length": source, "target_length": target}
    ours = heat[OURS]
    flops_per_token = rows * model.flops_per_sample(**sides) * (1 - ours["padding"]) / ours["tokens_per_step"]
    return [flops_per_token * a / b for a, b in zip(ours["rates"], heat["matmul"]["rates"], strict=True)]


COLUMNS = (
    *("", "target tokens/s", "ours / theirs", "the same by processor time", "step s", "p95 / median", "padding"),
    *("peak MiB a rank", "first step after s", "checkpoint MiB", "on disk after s", "training waits s"),
)


def table(heats: Heats) -> str:
    """Markdown: a table a heat."""
    lines = []
    for title, heat in heats.items():
        lines += [f"**{title}**", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [f"| {' | '.join(_cells(name, heat))} |" for name in heat]
        others = [f"{name} {one['parameters_more']:+,}" for name, one in heat.items() if one["parameters_more"]]
        lines += ["", f"Parameters, beside those of the lap: {', '.join(others)}."] if others else []
        lines.append("")
    return "\n".join(lines)


def _cells(name: str, heat: Mapping[str, Mapping[str, Any]]) -> list[str]:
    one, ours = heat[name], heat.get(OURS)
    ratio = processor = ""
    if ours is not None and name != OURS:
        ratio = spread(ratios(heat, name))
        processor = f"{ours['tokens_per_processor_second'] / one['tokens_per_processor_second']:.2f}"
    saved = ["", "", ""]
    if "checkpoint_bytes" in one:
        times = (f"{one[f'checkpoint_{key}']:.2f}" for key in ("seconds", "stall_seconds"))
        saved = [f"{one['checkpoint_bytes'] / 2**20:.0f}", *times]
    padding = "" if one["padding"] is None else f"{100 * one['padding']:.1f} %"
    step = f"{one['step_seconds']:.3f}", f"{one['jitter']:.2f}", padding
    memory = f"{one['memory_bytes'] / 2**20:.0f}"
    speed = f"{one['tokens_per_second']:,.0f}", ratio, processor
    return [name, *speed, *step, memory, f"{one['start_seconds']:.1f}", *saved]


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def draw(heats: Heats, path: Path) -> None:
    """Useful target tokens per second of all, by heat; a whisker spans the rounds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    columns = min(len(heats), 3)
    rows = -(-len(heats) // columns)
    size = (3.6 * columns + 1, 2.6 * rows + 0.4)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(heats) :]:
        axis.set_axis_off()
    for axis, (title, heat) in zip(axes.flat, heats.items(), strict=False):
        middles = [one["tokens_per_second"] for one in heat.values()]
        spans = [[m - min(o["rates"]) for m, o in zip(middles, heat.values(), strict=True)]]
        spans += [[max(o["rates"]) - m for m, o in zip(middles, heat.values(), strict=True)]]
        colours = ["#c2410c" if name == OURS else "#94a3b8" for name in heat]
        axis.barh(list(heat), middles, xerr=spans, color=colours, ecolor="#334155", capsize=2)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
    figure.supxlabel("useful target tokens per second (median, and range of the rounds)", fontsize=9)
    figure.savefig(path, dpi=120)
