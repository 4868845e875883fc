"""The page: a template beside this file, filled with what `history` read and `charts` drew."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from trainer.errors import SetupError
from trainer.report.charts import draw_png, interactive
from trainer.report.history import History, differing_settings

_SAMPLES = 12
"""Texts of each run that the page shows."""

_DEVELOPING, _STEPS = 3, 8
"""Texts that are shown as they came out at so many evaluations."""

_REJECTED = 10
"""Records that gave no sample, shown with their reasons."""

_FACTS = (
    ("state", lambda run: f"{run.status.get('state', 'unknown')}: {run.status.get('reason', '')}"),
    ("step", lambda run: _number(run.status.get("step"))),
    ("ranks", lambda run: _number(run.plan.get("world_size"))),
    ("engine", lambda run: _engine(run)),
    ("precision", lambda run: run.settings.get("precision")),
    ("samples a step", lambda run: _number(run.plan.get("global_size"))),
    ("training loss", lambda run: _number(run.last("loss"))),
    ("validation loss", lambda run: _number(run.last("eval/loss"))),
    ("target tokens", lambda run: _number(run.last("tokens"))),
    ("target tokens per second", lambda run: _number(run.last("tokens_per_second"))),
    ("seconds a step", lambda run: _beside(run.last("step_seconds"), run.plan.get("predicted_step_seconds"))),
    ("peak memory of a rank, GB", lambda run: _beside(*_gigabytes(run))),
    ("steps without an update", lambda run: _number(_whole(run.last("skipped_steps")))),
    ("padding, newest", lambda run: _percent(run.last("padding_fraction"))),
    ("records not used", lambda run: _number(_whole(run.last("data.bad_record")))),
)


def write_report(histories: Sequence[History], page: Path, told: str | None = None) -> None:
    """Write the page and, beside it, the PNG. told: the words that named the page. Raises SetupError without their
    libraries, or where they cannot be written."""
    html = render(histories)
    try:
        page.write_text(html, encoding="utf-8")
        draw_png(histories, page.with_suffix(".png"))
    except OSError as error:
        raise SetupError(
            f"{told or page} cannot be written: {error.strerror}; choose another file with to=FILE.html."
        ) from error


def render(histories: Sequence[History]) -> str:
    """One self-contained HTML page. Raises SetupError without plotly."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        title=", ".join(history.name for history in histories),
        runs=[_shown(history) for history in histories],
        facts=[(label, [fact(history) for history in histories]) for label, fact in _FACTS],
        finals=_finals(histories),
        settings=differing_settings(histories) if len(histories) > 1 else sorted(histories[0].settings.items()),
        compared=len(histories) > 1,
        charts=interactive(histories),
    )


def _shown(history: History) -> dict[str, Any]:
    samples = history.samples(_SAMPLES)
    rejected, first_rejected = history.quarantine(_REJECTED)
    columns = [name for name in ("source", "reference", "hypothesis") if any(name in row for row in samples)]
    return {
        "name": history.name,
        "events": list(history.events),
        "columns": columns or sorted({name for row in samples for name in row}),
        "samples": samples,
        "developing": history.developing(_DEVELOPING, _STEPS),
        "rejected": rejected,
        "first_rejected": first_rejected,
    }


def _finals(histories: Sequence[History]) -> list[tuple[str, list[str]]]:
    """(metric, its value in each run) of the evaluations at the runs' ends."""
    names = dict.fromkeys(name for history in histories for name in history.final if name != "step")
    return [(name.removeprefix("eval/"), [_number(history.final.get(name)) for history in histories]) for name in names]


def _engine(history: History) -> str:
    stage = history.plan.get("zero_stage", 0)
    return f"ZeRO-{stage}" if history.plan.get("engine") == "zero" else str(history.plan.get("engine", ""))


def _gigabytes(history: History) -> list[float | None]:
    """Measured and predicted peak of a rank."""
    sizes = (history.last("memory_bytes"), history.plan.get("predicted_memory_bytes"))
    return [None if size is None else size * 1e-9 for size in sizes]


def _beside(measured: float | None, predicted: float | None) -> str:
    return _number(measured) + (f" (predicted {_number(predicted)})" if predicted is not None else "")


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _number(value: object) -> str:
    """Whole numbers in full, others with five significant digits, nothing as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
