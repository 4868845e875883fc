from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from trainer.metrics import RunInfo, StepInfo
from trainer.metrics.sinks import JsonLinesSink, SafeSinks

MakeRun = Callable[..., RunInfo]
MakeStep = Callable[..., StepInfo]


class Recorder:
    """Keeps the names of the calls it gets; fails in those it is told to."""

    def __init__(self, *failing: str) -> None:
        self.calls: list[str] = []
        self._failing = failing

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self._failing:
            raise OSError(f"no {name} today")

    def open(self, run: RunInfo) -> None:
        self._called("open")

    def log(self, info: StepInfo) -> None:
        self._called("log")

    def log_evaluation(self, step: int, metrics: Mapping[str, float | str]) -> None:
        self._called("log_evaluation")

    def event(self, step: int, message: str) -> None:
        self._called("event")

    def close(self, status: str) -> None:
        self._called(f"close {status}")


class Attentive(Recorder):
    """Also wants to hear of alarms and checkpoints."""

    def alarm(self, step: int, message: str) -> None:
        self._called(f"alarm {message}")

    def saved(self, step: int, checkpoint: Path) -> None:
        self._called(f"saved {checkpoint}")


def test_alarms_and_checkpoints_come_to_those_who_want_them_and_alarms_to_others_as_events() -> None:
    plain, attentive = Recorder(), Attentive()
    sinks = SafeSinks([plain, attentive], pytest.fail)
    sinks.alarm(3, "a spike")
    sinks.saved(4, Path("step_00000004"))
    assert plain.calls == ["event"]
    assert attentive.calls == ["alarm a spike", "saved step_00000004"]


def play(sinks: SafeSinks, run: RunInfo, make_step: MakeStep) -> None:
    sinks.open(run)
    sinks.log(make_step(1))
    sinks.log(make_step(2))
    sinks.log_evaluation(2, {"eval/loss": 1.0})
    sinks.event(2, "saved")
    sinks.close("finished")


@pytest.mark.parametrize("failing", ["open", "log", "log_evaluation", "event", "close finished"])
def test_a_failing_sink_is_reported_once_and_the_others_go_on(
    failing: str, make_run: MakeRun, make_step: MakeStep
) -> None:
    reports: list[str] = []
    broken, healthy = Recorder(failing), Recorder()
    play(SafeSinks([broken, healthy], reports.append), make_run(), make_step)
    assert healthy.calls == ["open", "log", "log", "log_evaluation", "event", "close finished"]
    assert broken.calls.count(failing) == 1
    assert len(reports) == 1
    assert "Recorder" in reports[0] and f"no {failing} today" in reports[0] and "training goes on" in reports[0]


def test_a_sink_switched_off_in_the_middle_may_tidy_up(make_run: MakeRun, make_step: MakeStep) -> None:
    broken = Recorder("log", "close failed")
    reports: list[str] = []
    play(SafeSinks([broken], reports.append), make_run(), make_step)
    assert broken.calls == ["open", "log", "close failed"]
    assert len(reports) == 1


def test_a_person_can_still_interrupt(make_run: MakeRun) -> None:
    class Interrupted(Recorder):
        def open(self, run: RunInfo) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SafeSinks([Interrupted()]).open(make_run())


def read(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def test_metrics_file_holds_steps_evaluations_and_events(
    make_run: MakeRun, make_step: MakeStep, tmp_path: Path
) -> None:
    play(SafeSinks([JsonLinesSink()]), make_run(), make_step)
    first, second, evaluation, event = read(tmp_path / "metrics.jsonl")
    told = {name for name, value in asdict(make_step(1)).items() if value != {}}
    assert (
        set(first) == told and {"norms", "mixture", "memory_by_rank"} == {one.name for one in fields(StepInfo)} - told
    )
    assert (first["step"], second["step"], second["tokens"], second["mfu"]) == (1, 2, 2000, None)
    assert evaluation == {"step": 2, "eval/loss": 1.0}
    assert event == {"step": 2, "event": "saved"}


def test_each_line_can_be_read_as_soon_as_it_is_logged(make_run: MakeRun, make_step: MakeStep, tmp_path: Path) -> None:
    sink = JsonLinesSink()
    sink.open(make_run())
    sink.log(make_step(1))
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1]
    sink.close("finished")


def test_a_diverged_loss_is_still_valid_json(make_run: MakeRun, make_step: MakeStep, tmp_path: Path) -> None:
    sink = JsonLinesSink()
    sink.open(make_run())
    sink.log(make_step(1, loss=math.nan))
    sink.close("failed")
    assert read(tmp_path / "metrics.jsonl")[0]["loss"] is None


def test_resuming_takes_away_what_will_be_done_again(make_run: MakeRun, make_step: MakeStep, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLinesSink()
    sink.open(make_run())
    for step in (10, 20, 30):
        sink.log(make_step(step))
    sink.log_evaluation(30, {"eval/loss": 1.0})
    sink.close("failed")
    with path.open("a") as file:
        file.write('{"step": 35, "lo')  # the machine went down in the middle of a line

    again = JsonLinesSink()
    again.open(make_run(first_step=20))
    again.log(make_step(30, loss=9.0))
    again.close("finished")
    assert [(row["step"], row["loss"]) for row in read(path)] == [(10, 2.5), (20, 2.5), (30, 9.0)]


def test_a_fresh_start_leaves_nothing_of_an_older_run(make_run: MakeRun, make_step: MakeStep, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 5.0}\n')
    sink = JsonLinesSink()
    sink.open(make_run(first_step=0))
    sink.close("finished")
    assert read(path) == []


def test_another_place_for_the_file(make_run: MakeRun, make_step: MakeStep, tmp_path: Path) -> None:
    sink = JsonLinesSink(tmp_path / "deep" / "other.jsonl")
    sink.open(make_run())
    sink.log(make_step(1))
    sink.close("finished")
    assert len(read(tmp_path / "deep" / "other.jsonl")) == 1
