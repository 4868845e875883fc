"""What is drawn of runs: one list of panels, as interactive charts for the page and as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import SetupError
from trainer.report.history import Curve, History, thinned

MOST_POINTS = 2000
"""Of a curve, drawn: a screen has no more columns."""

_FEW = 20
"""Points that are marked one by one."""

_COLOURS = ("#3b5bdb", "#e8590c", "#2b8a3e", "#9c36b5", "#c92a2a", "#0b7285", "#846200", "#495057")
_DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Panel:
    """A chart. curves: name in `History.curves` -> how the legend calls it; or, of a `family`, all whose names begin
    with `family.`; scale: what values are multiplied by; holds: a value holds until the next one; rare: of nothing but
    zeros, there is nothing to see."""

    section: str
    title: str
    curves: Mapping[str, str] = field(default_factory=dict)
    family: str | None = None
    scale: float = 1.0
    holds: bool = False
    rare: bool = False
    log: bool = False

    def members(self, history: History) -> dict[str, str]:
        """Those of its curves that a run has, and what they are called."""
        if self.family is None:
            return {name: label for name, label in self.curves.items() if name in history.curves}
        prefix = f"{self.family}."
        return {name: name.removeprefix(prefix) for name in history.curves if name.startswith(prefix)}


@dataclass(frozen=True)
class Line:
    """What is drawn of a run in a panel."""

    run: int
    member: int
    label: str
    curve: Curve


def _one(section: str, title: str, curve: str, **more: Any) -> Panel:
    return Panel(section, title, {curve: ""}, **more)


_LEARNING, _SPEED, _DATA = "Learning", "Speed and memory", "Data"
_PANELS = (
    Panel(_LEARNING, "loss, nats per target token", {"loss": "training", "eval/loss": "validation"}),
    _one(_LEARNING, "learning rate", "lr"),
    _one(_LEARNING, "norm of the gradient, before clipping", "grad_norm", log=True),
    Panel(_LEARNING, "norm of the gradient by group of layers", family="norms", log=True),
    _one(_LEARNING, "steps without an update, so far", "skipped_steps", rare=True),
    _one(_SPEED, "target tokens per second", "tokens_per_second"),
    Panel(_SPEED, "seconds a step", {"step_seconds": "whole", "loader_wait_seconds": "waiting for data"}),
    _one(_SPEED, "model FLOP/s over the peak (MFU)", "mfu"),
    _one(_SPEED, "peak memory of the largest rank, GB", "memory_bytes", scale=1e-9),
    Panel(_SPEED, "peak memory by rank, GB", family="memory_by_rank", scale=1e-9, holds=True),
    _one(_DATA, "padding, share of positions", "padding_fraction"),
    Panel(_DATA, "records not used or changed, so far", family="data", rare=True),
    Panel(_DATA, "mixture: share of each source", family="mixture"),
)
_NOT_DRAWN = {"eval/seconds", "eval/samples", "eval/perplexity", *(name for panel in _PANELS for name in panel.curves)}


def panels_of(histories: Sequence[History]) -> list[Panel]:
    """The panels that any run has something to show in; every other metric of evaluations comes after the losses."""
    others = sorted({name for history in histories for name in history.curves if name.startswith("eval/")} - _NOT_DRAWN)
    metrics = [_one(_LEARNING, f"validation: {name.removeprefix('eval/')}", name) for name in others]
    first, *rest = _PANELS
    return [panel for panel in (first, *metrics, *rest) if _shows(panel, histories)]


def _shows(panel: Panel, histories: Sequence[History]) -> bool:
    lines = lines_of(panel, histories)
    return any(any(line.curve[1]) for line in lines) if panel.rare else bool(lines)


def lines_of(panel: Panel, histories: Sequence[History]) -> list[Line]:
    """The lines of all runs, thinned to what a screen shows."""
    lines = []
    for run, history in enumerate(histories):
        for member, (name, label) in enumerate(panel.members(history).items()):
            steps, values = thinned(history.curves[name], MOST_POINTS)
            if panel.holds and steps[-1] < history.last_step:
                steps, values = [*steps, history.last_step], [*values, values[-1]]
            words = [history.name] if len(histories) > 1 or not label else []
            told = ": ".join([*words, label] if label else words)
            lines.append(Line(run, member, told, (steps, [value * panel.scale for value in values])))
    return lines


def _alone(lines: Sequence[Line]) -> bool:
    """Whether the lines are of one run, so that colours tell its curves apart; else they tell the runs."""
    return len({line.run for line in lines}) == 1


def interactive(histories: Sequence[History]) -> dict[str, list[str]]:
    """By section a `<div>` for each panel; the first brings the library that draws them all. Raises SetupError without
    plotly."""
    try:
        from plotly import graph_objects
    except ImportError as error:
        raise SetupError("The page's charts need plotly; install shardwright[plots].") from error
    sections: dict[str, list[str]] = {}
    for number, panel in enumerate(panels_of(histories)):
        figure = graph_objects.Figure()
        lines = lines_of(panel, histories)
        alone = _alone(lines)
        for line in lines:
            steps, values = line.curve
            colour = _COLOURS[(line.member if alone else line.run) % len(_COLOURS)]
            dash = "solid" if alone else _DASHES[line.member % len(_DASHES)]
            figure.add_scatter(
                x=steps,
                y=values,
                name=line.label,
                mode="lines+markers" if len(steps) < _FEW else "lines",
                line={"color": colour, "dash": dash, "width": 1.8, "shape": "hv" if panel.holds else "linear"},
            )
        figure.update_layout(
            title={"text": panel.title, "font": {"size": 14}, "x": 0.01, "xanchor": "left"},
            xaxis={"title": {"text": "step", "standoff": 4}},
            yaxis={"type": "log" if panel.log else "linear"},
            height=310 if len(lines) < 2 else 330,
            margin={"l": 56, "r": 12, "t": 40, "b": 40},
            showlegend=len(lines) > 1,
            legend={"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0, "xanchor": "left"},
            hovermode="x unified",
            template="plotly_white",
        )
        unused = ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"]
        settings = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": unused}
        library = False if number else "inline"
        sections.setdefault(panel.section, []).append(
            figure.to_html(full_html=False, include_plotlyjs=library, config=settings)
        )
    return sections


def draw_png(histories: Sequence[History], path: Path) -> None:
    """The panels as one picture. Raises SetupError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise SetupError("A picture of the curves needs matplotlib; install shardwright[plots].") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = panels_of(histories)
    rows = max(1, -(-len(panels) // 2))
    figure, axes = pyplot.subplots(rows, 2, figsize=(11, 3.2 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        lines = lines_of(panel, histories)
        alone = _alone(lines)
        for line in lines:
            axis.plot(
                *line.curve,
                label=line.label,
                color=_COLOURS[(line.member if alone else line.run) % len(_COLOURS)],
                linestyle="-" if alone else ("-", "--", ":", "-.")[line.member % 4],
                marker="." if len(line.curve[0]) < _FEW else None,
                drawstyle="steps-post" if panel.holds else "default",
            )
        axis.set(title=panel.title, xlabel="step")
        if panel.log and all(value > 0 for line in lines for value in line.curve[1]):
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize="small", ncols=1 + len(lines) // 6)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
