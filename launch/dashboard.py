"""`python -m launch.dashboard project=NAME [entity=NAME]`: a W&B workspace that shows what runs of ours log.

Sections: learning, speed, memory, data, events, texts, comparison of runs and of the settings of a sweep. Calling it
again makes another view; nothing that exists is changed. `preview=true` prints what would be sent, without a network.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.commands import run_command
from trainer.errors import SetupError
from trainer.metrics.wandb import default_entity

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

_SECTIONS: Sequence[tuple[str, Sequence[tuple[str, Sequence[str]]]]] = (
    (
        "Learning",
        (
            ("loss", ("loss", "eval/loss")),
            ("accuracy and scores", ("eval/accuracy", "eval/bleu", "eval/chrf", "eval/rougeL", "eval/f1", "eval/wer")),
            ("learning rate", ("lr",)),
            ("norm of the gradient", ("grad_norm",)),
            ("epochs", ("epoch",)),
        ),
    ),
    (
        "Speed",
        (
            ("target tokens per second", ("tokens_per_second",)),
            ("model FLOP/s over the peak (MFU)", ("mfu",)),
            ("seconds a step", ("step_seconds", "loader_wait_seconds")),
        ),
    ),
    ("Memory", (("peak of the largest rank, bytes", ("memory_bytes",)),)),
    (
        "Data",
        (
            ("padding, share of positions", ("padding_fraction",)),
            ("records not used", ("data.bad_record",)),
            ("target tokens a step", ("target_tokens",)),
            ("target tokens and samples so far", ("tokens", "samples")),
        ),
    ),
    ("Events", (("steps without an update", ("skipped_steps",)),)),
)
"""(section, (title of a chart, the metrics in it)), by the names of `trainer.metrics.StepInfo` and of evaluations."""

_SWEPT = ("c::optimizer.lr", "c::batch.global_size", "c::seed")
"""Settings along which a sweep is drawn, beside the validation loss."""


@dataclass(frozen=True)
class DashboardOptions:
    """Arguments of `python -m launch.dashboard`. entity: null for that of the key."""

    project: str
    entity: str | None = None
    name: str = "Shardwright"
    preview: bool = False


def make_workspace(entity: str, project: str, name: str) -> Workspace:
    """The view, not yet saved. Raises SetupError without wandb-workspaces."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise SetupError("A dashboard needs wandb-workspaces; install shardwright[dashboard].") from error
    sections = [
        workspaces.Section(
            name=section,
            is_open=True,
            panels=[panels.LinePlot(title=title, x="step", y=list(metrics)) for title, metrics in charts],
        )
        for section, charts in _SECTIONS
    ]
    texts = [panels.WeavePanelSummaryTable(table_name="generations")]
    axes = [panels.ParallelCoordinatesPlotColumn(metric=key) for key in (*_SWEPT, "eval/loss")]
    compared = [panels.RunComparer(diff_only="split"), panels.ParallelCoordinatesPlot(columns=axes, title="sweep")]
    sections += [
        workspaces.Section(name="Texts", is_open=True, panels=texts),
        workspaces.Section(name="Comparison", is_open=False, panels=compared),
    ]
    settings = workspaces.WorkspaceSettings(x_axis="step", ignore_outliers=False, smoothing_type="none")
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def dashboard(options: DashboardOptions) -> None:
    """Save the view and print its address. Raises SetupError where W&B refuses or does not answer."""
    if options.preview:
        view = make_workspace(options.entity or "", options.project, options.name)._to_model()
        print(json.dumps(json.loads(view.model_dump_json(by_alias=True)), indent=1))
        return
    workspace = make_workspace(options.entity or "", options.project, options.name)
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
