"""`python -m launch.dashboard project=NAME [entity=NAME] [axis=KEY ...]`: a W&B workspace for what runs of ours log.

Sections: learning, gradients, speed, memory, data, events, texts, comparison of runs, sweep. Calling it again makes
another view; nothing that exists is changed. `axis=optimizer.lr axis=model.d_model` are the settings along which a
sweep is drawn. `preview=true` prints what would be sent, without a network.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainer.commands import run_command
from trainer.errors import SetupError
from trainer.metrics.wandb import default_entity

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


@dataclass(frozen=True)
class Chart:
    """Curves over our step. metrics: by the names in metrics.jsonl; pattern: instead, of all names that it matches."""

    title: str
    metrics: Sequence[str] = ()
    pattern: str | None = None
    log_y: bool = False


SECTIONS: dict[str, Sequence[Chart]] = {
    "Learning": (
        Chart("loss, nats per target token", ("loss", "eval/loss")),
        Chart("accuracy", ("eval/accuracy",)),
        Chart("scores", pattern=r"eval/(bleu|chrf|rougeL|f1|exact_match|wer|ndcg@\d+|recall@\d+)"),
        Chart("bits per byte", ("eval/bits_per_byte",)),
        Chart("learning rate", ("lr",)),
        Chart("epochs", ("epoch",)),
    ),
    "Gradients": (
        Chart("norm of the whole gradient, before clipping", ("grad_norm",), log_y=True),
        Chart("norm by group of layers", pattern=r"norms\..+", log_y=True),
    ),
    "Speed": (
        Chart("target tokens per second", ("tokens_per_second",)),
        Chart("model FLOP/s over the peak (MFU)", ("mfu",)),
        Chart("seconds a step, and waiting for data", ("step_seconds", "loader_wait_seconds")),
    ),
    "Memory": (
        Chart("peak of the largest rank, bytes", ("memory_bytes",)),
        Chart("peak by rank, bytes", pattern=r"memory_by_rank\..+"),
    ),
    "Data": (
        Chart("padding, share of positions", ("padding_fraction",)),
        Chart("records not used or changed, so far", pattern=r"data\..+"),
        Chart("mixture: share of each source", pattern=r"mixture\..+"),
        Chart("target tokens a step", ("target_tokens",)),
        Chart("target tokens and samples so far", ("tokens", "samples")),
    ),
    "Events": (Chart("steps without an update, so far", ("skipped_steps",)),),
}
"""By the names of `trainer.metrics.StepInfo` and of evaluations."""

OBJECTIVE = "eval/loss"
"""What a sweep is judged by."""


@dataclass(frozen=True)
class DashboardOptions:
    """Arguments of `python -m launch.dashboard`. entity: null for that of the key; axis: settings along which a sweep
    is drawn, null for learning rate, batch and seed."""

    project: str
    entity: str | None = None
    name: str = "Shardwright"
    axis: list[str] = field(default_factory=list)
    preview: bool = False

    @property
    def axes(self) -> list[str]:
        """The settings along which a sweep is drawn."""
        return self.axis or ["optimizer.lr", "batch.global_size", "seed"]


def make_workspace(options: DashboardOptions) -> Workspace:
    """The view, not yet saved. Raises SetupError without wandb-workspaces."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise SetupError("A dashboard needs wandb-workspaces; install shardwright[dashboard].") from error

    def drawn(chart: Chart) -> panels.LinePlot:
        curves = {"metric_regex": chart.pattern} if chart.pattern else {"y": list(chart.metrics)}
        return panels.LinePlot(title=chart.title, x="step", log_y=chart.log_y or None, **curves)

    texts = [panels.WeavePanelSummaryTable(table_name="generations")]
    tables = {"Events": [panels.WeavePanelSummaryTable(table_name="events")]}
    axes = [
        panels.ParallelCoordinatesPlotColumn(metric=panels.Config(key), log=key.endswith(".lr") or None)
        for key in options.axes
    ]
    objective = panels.ParallelCoordinatesPlotColumn(metric=OBJECTIVE)
    first = panels.Config(options.axes[0])
    swept = [
        panels.ParallelCoordinatesPlot(columns=[*axes, objective], title="settings and validation loss"),
        panels.ScatterPlot(title=f"{options.axes[0]} and validation loss", x=first, y=OBJECTIVE),
        panels.ParameterImportancePlot(with_respect_to=OBJECTIVE),
    ]
    sections = [
        *(
            workspaces.Section(name=name, is_open=True, panels=[*map(drawn, charts), *tables.get(name, ())])
            for name, charts in SECTIONS.items()
        ),
        workspaces.Section(name="Texts", is_open=True, panels=texts),
        workspaces.Section(name="Comparison", is_open=True, panels=[panels.RunComparer(diff_only="split")]),
        workspaces.Section(name="Sweep", is_open=False, panels=swept),
    ]
    settings = workspaces.WorkspaceSettings(x_axis="step", ignore_outliers=False, smoothing_type="none")
    return workspaces.Workspace(
        entity=options.entity or "", project=options.project, name=options.name, sections=sections, settings=settings
    )


def dashboard(options: DashboardOptions) -> None:
    """Save the view and print its address. Raises SetupError where W&B refuses or does not answer."""
    if options.preview:
        view = make_workspace(options)._to_model()
        print(json.dumps(json.loads(view.model_dump_json(by_alias=True)), indent=1))
        return
    workspace = make_workspace(options)
    try:
        workspace.entity = options.entity or default_entity()
        workspace.save()
    except Exception as error:  # requests, graphql and wandb each have their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SetupError(
            f"W&B did not take the dashboard: {reason}; see to WANDB_API_KEY, WANDB_BASE_URL and entity=...,"
            " or look at it with preview=true."
        ) from error
    print(workspace.url)


if __name__ == "__main__":
    sys.exit(run_command(DashboardOptions, dashboard, __doc__ or ""))
