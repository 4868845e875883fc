"""What is drawn of runs: one list of panels, as interactive charts for the page and as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import SetupError
from trainer.report.history import Curve, History, thinned

MOST_POINTS = 2000
"""Of a curve, drawn: a screen has no more columns."""


@dataclass(frozen=True)
class Panel:
    """A chart: the curve of each run by this name, times `scale`."""

    curve: str
    title: str
    scale: float = 1.0


_PANELS = (
    Panel("loss", "training loss, nats per target token"),
    Panel("eval/loss", "validation loss, nats per target token"),
    Panel("lr", "learning rate"),
    Panel("grad_norm", "norm of the gradient"),
    Panel("tokens_per_second", "target tokens per second"),
    Panel("mfu", "model FLOP/s over the peak (MFU)"),
    Panel("step_seconds", "seconds a step"),
    Panel("loader_wait_seconds", "seconds a step spent waiting for data"),
    Panel("padding_fraction", "padding, share of positions"),
    Panel("memory_bytes", "peak memory of the largest rank, GB", 1e-9),
    Panel("skipped_steps", "steps without an update, so far"),
    Panel("data.bad_record", "records that could not be used, so far"),
)
_NOT_DRAWN = {"eval/seconds", "eval/samples", *(panel.curve for panel in _PANELS)}


def panels_of(histories: Sequence[History]) -> list[Panel]:
    """The panels that any run has a curve for; every other metric of evaluations comes after the losses."""
    names = {name for history in histories for name in history.curves}
    known = [panel for panel in _PANELS if panel.curve in names]
    others = sorted(name for name in names - _NOT_DRAWN if name.startswith("eval/"))
    metrics = [Panel(name, f"validation: {name.removeprefix('eval/')}") for name in others]
    losses = [panel for panel in known if panel.curve in ("loss", "eval/loss")]
    return losses + metrics + [panel for panel in known if panel not in losses]


def drawn_curve(history: History, panel: Panel) -> Curve:
    """What a panel shows of a run; nothing where the run has no such curve."""
    steps, values = thinned(history.curves.get(panel.curve, ([], [])), MOST_POINTS)
    return steps, [value * panel.scale for value in values]


def interactive(histories: Sequence[History]) -> list[str]:
    """A `<div>` for each panel; the first brings the library that draws them all. Raises SetupError without plotly."""
    try:
        from plotly import graph_objects
    except ImportError as error:
        raise SetupError("The page's charts need plotly; install shardwright[plots].") from error
    divs: list[str] = []
    for panel in panels_of(histories):
        figure = graph_objects.Figure()
        for history in histories:
            steps, values = drawn_curve(history, panel)
            if steps:
                mode = "lines+markers" if len(steps) < 20 else "lines"
                figure.add_scatter(x=steps, y=values, name=history.name, mode=mode)
        figure.update_layout(
            title={"text": panel.title, "font": {"size": 14}},
            xaxis_title="step",
            height=300,
            margin={"l": 50, "r": 10, "t": 40, "b": 40},
            showlegend=len(histories) > 1,
            legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
            hovermode="x unified",
            template="plotly_white",
        )
        library = "inline" if not divs else False
        divs.append(
            figure.to_html(full_html=False, include_plotlyjs=library, config={"displaylogo": False, "responsive": True})
        )
    return divs


def draw_png(histories: Sequence[History], path: Path) -> None:
    """The panels as one picture, a line a run. Raises SetupError without matplotlib."""
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
        for history in histories:
            steps, values = drawn_curve(history, panel)
            axis.plot(steps, values, label=history.name, marker="." if len(steps) < 20 else None)
        axis.set(title=panel.title, xlabel="step")
        axis.grid(alpha=0.3)
    if len(histories) > 1:
        axes.flat[0].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
