from __future__ import annotations

import io
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from trainer.metrics import RunInfo, StepInfo
from trainer.metrics.console import ConsoleSink, Mode
from trainer.metrics.watched import Trend, WatchedRun, sparkline
from trainer.wording import format_seconds

MakeRun = Callable[..., RunInfo]
MakeStep = Callable[..., StepInfo]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


Clock = Callable[[], float]
FACTS = {
    "norms": {"embeddings": 0.5, "layers": 1.146},
    "mixture": {"web": 0.7, "books": 0.3},
    "memory_by_rank": {"0": 10**9, "1": 9 * 10**8},
}


@pytest.fixture
def clock() -> Clock:
    """A second each time that somebody looks."""
    ticks = itertools.count(1000)
    return lambda: float(next(ticks))


def play(stream: io.StringIO, clock: Clock, run: RunInfo, make_step: MakeStep, mode: Mode = "auto") -> str:
    sink = ConsoleSink(mode, stream, clock)
    sink.open(run)
    sink.log(make_step(40, **FACTS))
    sink.log_evaluation(40, {"eval/loss": 3.25, "eval/samples": 1234.0})
    sink.event(40, "saved a checkpoint")
    sink.close("finished")
    return stream.getvalue()


def test_plain_lines_where_there_is_no_terminal(clock: Clock, make_run: MakeRun, make_step: MakeStep) -> None:
    run = make_run(predicted_step_seconds=1.0, predicted_memory_bytes=8e8)
    assert play(io.StringIO(), clock, run, make_step).splitlines() == [
        "step  40/100  loss 2.5000  12,346 tokens/s  lr 3.00e-04  grad 1.25  ETA 2:00",
        "  speed     12,346 target tokens/s  50 % of 24,691 predicted  2 s a step  0 % waiting for data",
        "  update    lr 3.00e-04  gradient 1.25",
        "  gradient  embeddings 0.5  layers 1.1",
        "  data      epoch 0.80  40,000 tokens  padding 5.0 %  bad_record 2",
        "  mixture   web 70.0 %  books 30.0 %",
        "  memory    peak 953.7 MiB  762.9 MiB predicted  by rank 953.7 MiB, 858.3 MiB",
        "evaluation at step 40  loss 3.25  samples 1,234",
        "step 40: saved a checkpoint",
        "finished at step 40 after 0:03",
    ]


def test_details_come_with_every_tenth_line(make_run: MakeRun, make_step: MakeStep) -> None:
    stream = io.StringIO()
    sink = ConsoleSink("lines", stream)
    sink.open(make_run())
    for step in range(1, 22):
        sink.log(make_step(step))
    lines = stream.getvalue().splitlines()
    assert len([line for line in lines if line.startswith("step")]) == 21
    before = [line for line, after in pairwise(lines) if after.startswith("  speed")]
    assert [line.split()[1] for line in before] == ["1/100", "11/100", "21/100"]


def test_a_live_view_on_a_terminal(
    clock: Clock, make_run: MakeRun, make_step: MakeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm-256color")
    output = play(Terminal(), clock, make_run(predicted_step_seconds=1.6), make_step)
    assert "40/100" in output and "━" in output and "ETA 2:00" in output
    assert "\x1b[2K" in output, "the view is redrawn in place"
    last = output.rpartition("trial")[2]
    for fact in ("2.5000", "12,346 target tokens/s", "80 % of 15,432 predicted", "0 % waiting", "padding 5.0 %"):
        assert fact in last
    for fact in ("bad_record 2", "peak 953.7 MiB", "step 40  loss 3.25  samples 1,234", "step 40: saved a checkpoint"):
        assert fact in last
    for fact in ("embeddings 0.5  layers 1.1", "web 70.0 %  books 30.0 %", "by rank 953.7 MiB, 858.3 MiB"):
        assert fact in last
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1, "the cursor is given back"
    assert re.search(r"finished at step 40 after 0:\d\d$", output.rstrip())


@pytest.mark.parametrize("columns", [30, 60, 200])
def test_the_live_view_fits_its_terminal(
    columns: int, clock: Clock, make_run: MakeRun, make_step: MakeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No fact is cut where it could go on in the next line."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    sink = ConsoleSink("live", stream := Terminal(), clock)
    sink.open(make_run(predicted_memory_bytes=1e9))
    sink.log(make_step(40, **FACTS))
    last = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", stream.getvalue()).rpartition("trial")[2]
    assert max(map(len, last.splitlines())) <= columns
    assert ("━" in last) == (columns > 30)
    if columns > 30:
        for fact in ("ETA 2:00", "12,346 target tokens/s", "0 % waiting for data", "books 30.0 %", "bad_record 2"):
            assert fact in last
    sink.close("finished")


def test_steps_that_are_logged_fast_are_not_each_drawn(make_run: MakeRun, make_step: MakeStep) -> None:
    now = [0.0]
    sink = ConsoleSink("live", stream := Terminal(), lambda: now[0])
    sink.open(make_run())
    for step in range(1, 101):
        now[0] += 0.01
        sink.log(make_step(step))
    sink.close("finished")
    drawn = stream.getvalue().count("12,346 target tokens/s")
    assert 10 <= drawn <= 12 and "100/100" in stream.getvalue().rpartition("trial")[2], "and the last one is"


def test_a_terminal_that_cannot_redraw_gets_lines(
    clock: Clock, make_run: MakeRun, make_step: MakeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert play(Terminal(), clock, make_run(), make_step).startswith("step  40/100  loss 2.5000")


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
    clock: Clock, make_run: MakeRun, make_step: MakeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = re.compile(r"\x1b\[(3\d|38;)")
    assert coloured.search(play(Terminal(), clock, make_run(), make_step))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured.search(play(Terminal(), clock, make_run(), make_step))


def test_json_for_machines(clock: Clock, make_run: MakeRun, make_step: MakeStep) -> None:
    rows = [json.loads(line) for line in play(io.StringIO(), clock, make_run(), make_step, "json").splitlines()]
    assert rows[0]["loss"] == 2.5 and rows[1] == {"step": 40, "eval/loss": 3.25, "eval/samples": 1234.0}
    assert rows[2:] == [{"step": 40, "event": "saved a checkpoint"}, {"step": 40, "status": "finished"}]


def test_quiet_tells_events_and_the_end(clock: Clock, make_run: MakeRun, make_step: MakeStep) -> None:
    assert play(Terminal(), clock, make_run(), make_step, "quiet").splitlines() == [
        "step 40: saved a checkpoint",
        "finished at step 40 after 0:01",
    ]


def test_a_sparkline_is_the_whole_history() -> None:
    assert sparkline([1.0, 2.0, 3.0], 10) == "▁▅█"
    assert len(sparkline([float(n) for n in range(1000)], 48)) == 48
    assert sparkline([2.0] * 5, 10) == "▁" * 5 and sparkline([], 10) == "" == sparkline([1.0], 0)
    assert sparkline([9.0, 1.0, 2.0, 3.0, 1.0], 5) == "█▁▅█▁", "the fall at the beginning hides nothing"


def test_a_trend_of_any_length_takes_the_same_room() -> None:
    trend = Trend()
    for value in (*range(100_000), math.nan):
        trend.add(float(value))
    assert len(trend._means) < 256
    assert trend.sparkline(8) == "▁▂▃▄▅▆▇█"


def test_the_time_left_counts_evaluations_and_the_nearest_end(make_run: MakeRun, make_step: MakeStep) -> None:
    now = [0.0]
    run = make_run()
    watched = WatchedRun(run, lambda: now[0])
    assert watched.left_seconds is None
    watched.log(make_step(20))
    assert watched.left_seconds == pytest.approx(80 * 2.0)
    now[0] = 60.0  # 20 steps of 2 s, and 20 s of evaluations
    watched.log(make_step(40))
    assert watched.left_seconds == pytest.approx(60 * 2.0 * 60 / 40)
    by_tokens = WatchedRun(replace(run, config={"stop": {"tokens": 50_000}}), lambda: now[0])
    by_tokens.log(make_step(40))
    assert by_tokens.share == pytest.approx(0.8) and by_tokens.left_seconds == pytest.approx(10 * 2.0)


def test_what_deserves_a_look_is_marked(make_run: MakeRun, make_step: MakeStep) -> None:
    watched = WatchedRun(make_run(predicted_step_seconds=1.0, predicted_memory_bytes=5e8), lambda: 0.0)
    watched.log(make_step(40, skipped_steps=2, **FACTS))
    marked = {words.text for row in watched.rows().values() for words in row if words.alarm}
    assert marked == {"50 % of 24,691 predicted", "skipped 2", "bad_record 2", "peak 953.7 MiB"}


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (245, "4:05"), (3845, "1:04:05")])
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
