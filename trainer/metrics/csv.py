"""`metrics.csv` and `evaluations.csv` in the run directory: the run for a spreadsheet."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from trainer.metrics import RunInfo, StepInfo
from trainer.metrics.json_lines import truncate_after
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
    """A CSV file with a header, of rows that begin with a step and are a line each."""

    def __init__(self, path: Path, last_step: int) -> None:
        self._path = path
        self._columns: list[str] = []
        if path.exists():
            truncate_after(path, last_step, _step_of)
            self._columns = next(self._rows(), [])

    def append(self, row: Mapping[str, Any]) -> None:
        new = [name for name in row if name not in self._columns]
        if new:
            self._widen(new)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            self._writer(file).writerow(
                {name: " ".join(v.splitlines()) if isinstance(v, str) else v for name, v in row.items()}
            )

    def _widen(self, new: Sequence[str]) -> None:
        """Add columns, in one move; row by row, for the file may be larger than the memory."""
        old = self._rows()
        next(old, None)  # the header
        self._columns += new
        partial = self._path.with_name(f".{self._path.name}.partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            self._writer(file).writeheader()
            csv.writer(file).writerows(row + [""] * len(new) for row in old)
        partial.replace(self._path)

    def _rows(self) -> Iterator[list[str]]:
        if self._path.exists():
            with self._path.open(newline="", encoding="utf-8") as file:
                yield from csv.reader(file)

    def _writer(self, file: TextIO) -> csv.DictWriter[str]:
        return csv.DictWriter(file, self._columns)


def _step_of(line: bytes) -> float:
    """The step of a row, infinity if it has none; the header comes before all."""
    step = line.partition(b",")[0]
    return -math.inf if step == b"step" else float(step) if step.isdigit() else math.inf
