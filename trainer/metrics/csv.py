"""`metrics.csv` and `evaluations.csv` in the run directory: the run for a spreadsheet."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.metrics import RunInfo, StepInfo
from trainer.wording import flatten


class CsvSink:
    """A line a logged step in metrics.csv, a line an evaluation in evaluations.csv, with the names of metrics.jsonl.

    A resumed run takes away the lines of steps that it repeats. A column that appears later rewrites the file.
    """

    def open(self, run: RunInfo) -> None:
        """See the contract."""
        self._steps = _Table(run.directory / "metrics.csv", run.first_step)
        self._evaluations = _Table(run.directory / "evaluations.csv", run.first_step)

    def log(self, info: StepInfo) -> None:
        """See the contract."""
        self._steps.append(dict(flatten(info.row())))

    def log_evaluation(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """See the contract."""
        self._evaluations.append({"step": step, "split": "validation", **metrics})

    def event(self, step: int, message: str) -> None:
        """See the contract: a table of numbers has no place for events; metrics.jsonl has them."""

    def close(self, status: str) -> None:
        """See the contract: each line is written and closed when it is logged."""


class _Table:
    """A CSV file with a header, of rows that have a step."""

    def __init__(self, path: Path, last_step: int) -> None:
        self._path = path
        self._columns: list[str] = []
        if path.exists():
            rows = [row for row in _read(path) if row["step"].isdigit() and int(row["step"]) <= last_step]
            self._columns = list(rows[0]) if rows else []
            self._rewrite(rows)

    def append(self, row: Mapping[str, Any]) -> None:
        new = [name for name in row if name not in self._columns]
        if new:
            rows = _read(self._path) if self._path.exists() else []
            self._columns += new
            self._rewrite(rows)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the file in one move; none where there are no columns yet."""
        if not self._columns:
            self._path.unlink(missing_ok=True)
            return
        partial = self._path.with_name(f".{self._path.name}.partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self._path)


def _read(path: Path) -> list[dict[str, str]]:
    """The rows with as many values as there are columns: a crash may have cut the last."""
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row and None not in row.values() and row.get("step")]
