"""The page of one run and of several, opened in a real browser without a screen."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from trainer.errors import CheckpointError, SetupError
from trainer.report.__main__ import ReportOptions, report
from trainer.report.charts import MOST_POINTS, lines_of, panels_of
from trainer.report.history import differing_settings, read_history, thinned
from trainer.run_directory import RunDirectory

MakeRun = Callable[..., RunDirectory]
PANELS = {
    "loss, nats per target token": 2,
    "validation: bleu": 1,
    "learning rate": 1,
    "norm of the gradient by group of layers": 2,
    "target tokens per second": 1,
    "peak memory of the largest rank, GB": 1,
    "peak memory by rank, GB": 2,
    "records not used or changed, so far": 2,
    "mixture: share of each source": 2,
}
"""The charts of the run below, and how many lines each has of a run."""
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A run directory as a run leaves it, with 30 logged steps, two evaluations and a skipped step."""

    def make(name: str, lr: float = 0.001, hypothesis: str = "Ein Satz") -> RunDirectory:
        path = tmp_path / "runs" / name
        (path / "generations").mkdir(parents=True)
        rows: list[dict[str, object]] = [
            {
                **{"step": step, "loss": 3 / step, "lr": lr, "tokens_per_second": 900.0, "memory_bytes": 2e9},
                **{"skipped_steps": 0, "data": {"bad_record": step // 10, "Length": 0}},
                **{"norms": {"embeddings": 0.5, "encoder": 1.5}, "mixture": {"web": 0.7, "books": 0.3}},
                "memory_by_rank": {"0": 2e9, "1": 1e9} if step == 1 else {},
            }
            for step in range(1, 31)
        ]
        rows.insert(20, {"step": 20, "event": "step 20 skipped: the loss is not finite"})
        rows += [{"step": step, "eval/loss": 1 / step, "eval/bleu": float(step)} for step in (15, 30)]
        rows.append({"step": 30, "split": "test", "eval/loss": 9.0})
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = {"source": "A sentence", "reference": "Ein Satz", "hypothesis": hypothesis}
        (path / "generations" / "step_00000030.test.jsonl").write_text(json.dumps(text) + "\n")
        for step, outcome in ((15, "Ein"), (30, "Ein Satz!")):
            lines = json.dumps({**text, "hypothesis": outcome}) + "\n"
            (path / "generations" / f"step_{step:08d}.jsonl").write_text(lines)
        rejected = {"step": 10, "shard": "web/train-0.jsonl", "offset": 17, "stage": "bad_record", "reason": "no de"}
        (path / "quarantine.jsonl").write_text((json.dumps(rejected) + "\n") * 3)
        (path / "config.yaml").write_text(yaml.safe_dump({"name": name, "optimizer": {"lr": lr}, "seed": 0}))
        (path / "plan.json").write_text(
            json.dumps({"world_size": 2, "engine": "zero", "zero_stage": 2, "predicted_memory_bytes": 1.5e9})
        )
        (path / "evaluation.json").write_text(json.dumps({"step": 30, "split": "test", "eval/bleu": 21.5}))
        (path / "status.json").write_text(json.dumps({"state": "finished", "step": 30, "reason": "steps: 30 of 30"}))
        return RunDirectory(path)

    return make


def test_curves_are_of_training_and_of_the_validation_split(make_run: MakeRun) -> None:
    history = read_history(make_run("small"))
    assert history.curves["eval/loss"] == ([15, 30], [1 / 15, 1 / 30])
    assert history.curves["loss"][1][:2] == [3.0, 1.5] and history.last("data.bad_record") == 3
    assert history.events == [(20, "step 20 skipped: the loss is not finite")]


def test_a_run_that_is_writing_is_read_up_to_its_last_whole_line(make_run: MakeRun) -> None:
    run = make_run("small")
    with run.metrics.open("a") as file:
        file.write('{"step": 31, "lo')
    assert read_history(run).curves["loss"][0][-1] == 30


def test_settings_that_differ_are_named_and_no_others(make_run: MakeRun) -> None:
    runs = [read_history(make_run(name, lr)) for name, lr in (("one", 0.001), ("two", 0.01))]
    assert differing_settings(runs) == [("optimizer.lr", [0.001, 0.01])]


def test_thinning_keeps_ends_and_spikes() -> None:
    values = [1.0] * 100_000
    values[54_321], values[77_777] = 99.0, -99.0
    steps, kept = thinned((list(range(1, 100_001)), values), MOST_POINTS)
    assert len(steps) <= MOST_POINTS + 2 and steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (1, 100_000) and {99.0, -99.0} <= set(kept)


def test_a_long_run_is_read_into_few_points_with_its_spikes(tmp_path: Path) -> None:
    losses = {step: 2.0 for step in range(1, 70_001)} | {3: 99.0, 33_333: -99.0, 69_999: 98.0}
    (tmp_path / "config.yaml").write_text("name: long\n")
    lines = (f'{{"step": {step}, "loss": {loss}}}\n' for step, loss in losses.items())
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    steps, values = read_history(RunDirectory(tmp_path)).curves["loss"]
    assert len(steps) < 35_000 and steps == sorted(set(steps)) and (steps[0], steps[-1]) == (1, 70_000)
    assert {step: value for step, value in zip(steps, values, strict=True) if value != 2.0} == {
        3: 99.0,
        33_333: -99.0,
        69_999: 98.0,
    }


def test_a_browser_shows_the_page(make_run: MakeRun, tmp_path: Path) -> None:
    """Charts are there only when the page's script has run; the browser has no network."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    make_run("one", hypothesis="<script>document.title = 'taken over'</script>")
    make_run("two", lr=0.01)
    report(ReportOptions(run=["one", "two"], runs_dir=str(tmp_path / "runs"), to=str(tmp_path / "both.html")))
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    profile = ("--no-sandbox", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000")
    offline = ("--proxy-server=127.0.0.1:9",)
    command = [browser, "--headless", *profile, *offline, "--dump-dom", (tmp_path / "both.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "<title>one, two</title>" in done.stdout
    titles = re.findall(r'class="gtitle"[^>]*>([^<]+)', done.stdout)
    assert titles == list(PANELS), "what is zero throughout is not drawn"
    lines = re.findall(r'<g class="trace scatter', done.stdout)
    assert len(lines) == 2 * sum(PANELS.values()), "each chart has the lines of each run"
    assert "2 (predicted 1.5)" in done.stdout and "web/train-0.jsonl" in done.stdout and "bad_record 3" in done.stdout
    assert re.search(r"step 15</td><td>Ein</td>.*step 30</td><td>Ein Satz!</td>", done.stdout, re.DOTALL)
    assert "step 20 skipped: the loss is not finite" in done.stdout and "ZeRO-2" in done.stdout
    assert re.search(r"<th>optimizer\.lr</th><td>0\.001</td><td>0\.01</td>", done.stdout)


def test_peaks_of_memory_hold_to_the_end_of_the_run(make_run: MakeRun) -> None:
    history = read_history(make_run("small"))
    (panel,) = (panel for panel in panels_of([history]) if panel.family == "memory_by_rank")
    lines = {line.label: line.curve for line in lines_of(panel, [history])}
    assert lines == {"0": ([1, 30], [2.0, 2.0]), "1": ([1, 30], [1.0, 1.0])}


def test_a_page_that_cannot_be_written_names_the_key(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("one")
    with pytest.raises(SetupError, match=r"^to=/.*nowhere/page\.html cannot be written: No such file.*to=FILE\.html"):
        report(ReportOptions(["one"], to=str(tmp_path / "nowhere" / "page.html"), runs_dir=str(tmp_path / "runs")))


def test_a_damaged_line_is_named(make_run: MakeRun) -> None:
    run = make_run("small")
    run.metrics.write_text('{"step": 1, "loss": 2.0}\nnonsense\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2 is no line of metrics"):
        read_history(run)
