from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator

import pytest

from trainer.metrics import RunInfo, StepInfo
from trainer.metrics.console import ConsoleSink, Mode
from trainer.metrics.live import sparkline
from trainer.wording import format_seconds

MakeRun = Callable[..., RunInfo]
MakeStep = Callable[..., StepInfo]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Callable[[], float]:
    ticks: Iterator[float] = iter([1000.0, 1065.0])
    return lambda: next(ticks)


def play(
    stream: io.StringIO, clock: Callable[[], float], run: RunInfo, make_step: MakeStep, mode: Mode = "auto"
) -> str:
    sink = ConsoleSink(mode, stream, clock)
    sink.open(run)
    sink.log(make_step(40))
    sink.log_evaluation(40, {"eval/loss": 3.25, "eval/samples": 1234.0})
    sink.event(40, "saved a checkpoint")
    sink.close("finished")
    return stream.getvalue()


def test_plain_lines_where_there_is_no_terminal(
    clock: Callable[[], float], make_run: MakeRun, make_step: MakeStep
) -> None:
    assert play(io.StringIO(), clock, make_run(), make_step).splitlines() == [
        "step  40/100  loss 2.5000  12,346 tokens/s  lr 3.00e-04  grad 1.25  ETA 2:00",
        "evaluation at step 40  loss 3.25  samples 1,234",
        "step 40: saved a checkpoint",
        "finished at step 40 after 1:05",
    ]


def test_a_live_view_on_a_terminal(
    clock: Callable[[], float], make_run: MakeRun, make_step: MakeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm-256color")
    output = play(Terminal(), clock, make_run(), make_step)
    assert "40/100" in output and "━" in output and "ETA 2:00" in output
    assert "\x1b[2K" in output, "the view is redrawn in place"
    last = output.rpartition("trial")[2]
    for fact in ("loss", "2.5000  ▁", "12,346 target tokens/s", "2 s a step", "0 % waiting for data", "padding 5.0 %"):
        assert fact in last
    for fact in ("bad_record 2", "953.7 MiB", "step 40  loss 3.25  samples 1,234", "step 40: saved a checkpoint"):
        assert fact in last
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1, "the cursor is given back"
    assert output.rstrip().endswith("finished at step 40 after 1:05")


def test_steps_skipped_by_overflow_are_shown_when_there_are_some(make_run: MakeRun, make_step: MakeStep) -> None:
    stream = io.StringIO()
    sink = ConsoleSink(stream=stream)
    sink.open(make_run())
    sink.log(make_step(1, skipped_steps=3))
    assert "skipped 3" in stream.getvalue()


def test_standard_output_is_the_default(
    make_run: MakeRun, make_step: MakeStep, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = ConsoleSink()
    sink.open(make_run())
    sink.log(make_step(7))
    assert "step   7/100" in capsys.readouterr().out


def test_no_colours_where_they_are_not_wanted(
    clock: Callable[[], float], make_run: MakeRun, make_step: MakeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = re.compile(r"\x1b\[(3\d|38;)")
    assert coloured.search(play(Terminal(), clock, make_run(), make_step))
    monkeypatch.setenv("NO_COLOR", "1")
    ticks = iter([0.0, 1.0])
    assert not coloured.search(play(Terminal(), lambda: next(ticks), make_run(), make_step))


def test_json_for_machines(clock: Callable[[], float], make_run: MakeRun, make_step: MakeStep) -> None:
    rows = [json.loads(line) for line in play(io.StringIO(), clock, make_run(), make_step, "json").splitlines()]
    assert rows[0]["loss"] == 2.5 and rows[1] == {"step": 40, "eval/loss": 3.25, "eval/samples": 1234.0}
    assert rows[2:] == [{"step": 40, "event": "saved a checkpoint"}, {"step": 40, "status": "finished"}]


def test_quiet_tells_events_and_the_end(clock: Callable[[], float], make_run: MakeRun, make_step: MakeStep) -> None:
    assert play(Terminal(), clock, make_run(), make_step, "quiet").splitlines() == [
        "step 40: saved a checkpoint",
        "finished at step 40 after 1:05",
    ]


def test_a_sparkline_is_the_whole_history() -> None:
    assert sparkline([1.0, 2.0, 3.0, float("nan")], 10) == "▁▅█"
    assert len(sparkline([float(n) for n in range(1000)], 48)) == 48
    assert sparkline([2.0] * 5, 10) == "▁" * 5 and sparkline([], 10) == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (245, "4:05"), (3845, "1:04:05")])
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
