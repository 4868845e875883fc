"""What came of the runs of a sweep: one row each, as a table in Markdown and CSV, and as a picture."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config import config_from_yaml
from trainer.run_directory import RunDirectory


@dataclass(frozen=True)
class Row:
    """One run. values: what it was given, by key; metric: the headline of its task, and whether more of it is better;
    value: the best on the validation split; final: the same metric in evaluation.json, of its `split`."""

    name: str
    values: Mapping[str, str]
    state: str
    step: int = 0
    metric: str = ""
    more_is_better: bool = False
    value: float | None = None
    final: float | None = None
    split: str = ""

    @property
    def score(self) -> float | None:
        """What runs are compared by: on the validation split where it was evaluated, else at the end."""
        value = self.final if self.value is None else self.value
        return value if value is not None and math.isfinite(value) else None


def read_row(directory: RunDirectory, name: str, values: Mapping[str, str], otherwise: str) -> Row:
    """The row of a run from its files. otherwise: its state, where it has not written one."""
    status = directory.read_status()
    state, step = str(status.get("state", otherwise)), int(status.get("step", 0))
    if not directory.metrics.is_file():
        return Row(name, values, state, step)
    metric, more_is_better = headline(directory)
    rows = [row for row in _rows(directory.metrics) if row.get("split", "validation") == "validation"]
    found = [row[metric] for row in rows if row.get(metric) is not None]
    best = (max if more_is_better else min)(found, default=None)
    last = json.loads(directory.evaluation.read_text(encoding="utf-8")) if directory.evaluation.is_file() else {}
    final, split = last.get(metric), str(last.get("split", ""))
    return Row(name, values, state, step, metric, more_is_better, best, final, split)


def headline(directory: RunDirectory) -> tuple[str, bool]:
    """The metric by which the task of a run compares checkpoints, and whether more of it is better."""
    from trainer.parts import make_task

    config = config_from_yaml(directory.config)
    tokenizer = None if config.tokenizer is None else directory.read_tokenizer()
    metric, direction = make_task(config, tokenizer).headline()
    return metric, direction == "max"


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; the last may be on its way."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


@dataclass(frozen=True)
class Table:
    """The runs of a sweep; the best first, where they share a metric, then those without a value."""

    rows: Sequence[Row]
    metrics: list[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", sorted({row.metric for row in self.rows if row.metric}))

        def place(row: Row) -> tuple[bool, float]:
            score = row.score
            return score is None, 0.0 if score is None else (-score if row.more_is_better else score)

        if len(self.metrics) <= 1:
            object.__setattr__(self, "rows", sorted(self.rows, key=place))

    @property
    def keys(self) -> list[str]:
        """The keys that any run was given, in order."""
        return list(dict.fromkeys(key for row in self.rows for key in row.values))

    def lines(self) -> tuple[list[str], list[list[str]]]:
        """Column names and cells."""
        one = self.metrics[0] if len(self.metrics) == 1 else "headline"
        header = ["run", *self.keys, f"{one} (validation)", f"{one} (final)", "step", "state"]
        cells = []
        for row in self.rows:
            label = "" if len(self.metrics) <= 1 else f"{row.metric} "
            final = "" if row.final is None else f"{label}{row.final:.5g} ({row.split})"
            value = "" if row.value is None else f"{label}{row.value:.5g}"
            given = [_short(row.values.get(key, "")) for key in self.keys]
            cells.append([row.name, *given, value, final, str(row.step), row.state])
        return header, cells

    def markdown(self) -> str:
        """The table for people."""
        header, cells = self.lines()
        escaped = [[cell.replace("|", "\\|") for cell in line] for line in [header, *cells]]
        widths = [max(map(len, column)) for column in zip(*escaped, strict=True)]
        lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in escaped]
        return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]) + "\n"

    def csv(self) -> str:
        """The table for programs; numbers in full."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["run", *self.keys, "metric", "value", "final_split", "final", "step", "state"])
        for row in self.rows:
            given = [row.values.get(key, "") for key in self.keys]
            numbers = row.metric, _full(row.value), row.split, _full(row.final)
            writer.writerow([row.name, *given, *numbers, row.step, row.state])
        return text.getvalue()

    def draw(self, path: Path) -> bool:
        """The headline over each key, one panel a key; False where there is nothing to draw."""
        shown = [row for row in self.rows if row.score is not None]
        if not shown or len(self.metrics) != 1 or not self.keys:
            return False
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.2 * len(self.keys), 3.4), layout="constrained")
        panels = figure.subplots(1, len(self.keys), squeeze=False, sharey=True)[0]
        best = shown[0]
        for panel, key in zip(panels, self.keys, strict=True):
            texts = [row.values.get(key, "") for row in shown]
            numbers = _numbers(texts)
            places: Sequence[float] = numbers or [sorted(set(texts)).index(text) for text in texts]
            panel.scatter(places, [row.score for row in shown], color="tab:blue")
            panel.scatter(places[:1], [best.score], color="tab:red", label=f"best: {_short(texts[0])}")
            if numbers is None:
                panel.set_xticks(range(len(set(texts))), sorted(set(texts)))
            elif min(numbers) > 0 and max(numbers) / min(numbers) >= 10:
                panel.set_xscale("log")
            panel.set_xlabel(key)
            panel.legend(frameon=False)
        panels[0].set_ylabel(f"{best.metric} ({best.split if best.value is None else 'validation'})")
        figure.savefig(path, dpi=120)
        return True


def _numbers(texts: Sequence[str]) -> list[float] | None:
    try:
        return [float(text) for text in texts]
    except ValueError:
        return None


def _short(text: str) -> str:
    """A sampled number as people read it."""
    return f"{number[0]:.5g}" if len(text) > 8 and (number := _numbers([text])) else text


def _full(value: float | None) -> str:
    return "" if value is None else repr(value)
