"""The tables of a run for a spreadsheet."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from trainer.metrics import RunInfo, StepInfo
from trainer.metrics.csv import CsvSink

MakeRun = Callable[..., RunInfo]
MakeStep = Callable[..., StepInfo]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_steps_and_evaluations_are_rows(tmp_path: Path, make_run: MakeRun, make_step: MakeStep) -> None:
    sink = CsvSink()
    sink.open(make_run())
    for step in (1, 2):
        sink.log(make_step(step, loss=3.0 / step))
    sink.log_evaluation(2, {"eval/loss": 1.5})
    sink.log_evaluation(2, {"split": "test", "eval/loss": 1.25, "eval/bleu": 20.0})
    sink.close("finished")
    steps = rows(tmp_path / "metrics.csv")
    assert [(row["step"], row["loss"], row["data.bad_record"]) for row in steps] == [
        ("1", "3.0", "2"),
        ("2", "1.5", "2"),
    ]
    evaluations = rows(tmp_path / "evaluations.csv")
    assert [(row["split"], row["eval/bleu"]) for row in evaluations] == [("validation", ""), ("test", "20.0")]


def test_a_resumed_run_repeats_no_step(tmp_path: Path, make_run: MakeRun, make_step: MakeStep) -> None:
    first = CsvSink()
    first.open(make_run())
    for step in (1, 2, 3):
        first.log(make_step(step))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("4,40")  # cut by a crash
    second = CsvSink()
    second.open(make_run(first_step=2))
    for step in (3, 4):
        second.log(make_step(step, loss=9.0))
    assert [(row["step"], row["loss"]) for row in rows(tmp_path / "metrics.csv")] == [
        ("1", "2.5"),
        ("2", "2.5"),
        ("3", "9.0"),
        ("4", "9.0"),
    ]


def test_a_column_that_appears_later_and_a_text_of_lines(tmp_path: Path, make_run: MakeRun) -> None:
    for first_step in (0, 1):
        sink = CsvSink()
        sink.open(make_run(first_step=first_step))
        sink.log_evaluation(first_step + 1, {"eval/loss": 1.5, **({"eval/text": "a,\nb"} if first_step else {})})
    assert [(row["step"], row["eval/text"]) for row in rows(tmp_path / "evaluations.csv")] == [("1", ""), ("2", "a, b")]
