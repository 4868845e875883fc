from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import pytest

from trainer.metrics import RunInfo, StepInfo
from trainer.metrics.console import ConsoleSink, format_seconds

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


def play(stream: io.StringIO, clock: Callable[[], float], run: RunInfo, make_step: MakeStep) -> str:
    sink = ConsoleSink(stream, clock)
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


def test_a_live_bar_on_a_terminal(
    clock: Callable[[], float], make_run: MakeRun, make_step: MakeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm-256color")
    output = play(Terminal(), clock, make_run(), make_step)
    assert "40/100" in output and "━" in output and "ETA 2:00" in output
    assert "\x1b[2K" in output, "the bar is redrawn in place"
    assert "evaluation at step 40" in output
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1, "the cursor is given back"
    assert output.rstrip().endswith("finished at step 40 after 1:05")


def test_steps_skipped_by_overflow_are_shown_when_there_are_some(make_run: MakeRun, make_step: MakeStep) -> None:
    stream = io.StringIO()
    sink = ConsoleSink(stream)
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


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (245, "4:05"), (3845, "1:04:05")])
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
