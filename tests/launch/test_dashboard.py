"""The W&B workspace: what the library would send, and sending it to a server on this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.dashboard import DashboardOptions, dashboard
from tests.conftest import ROOT
from tests.test_training import tiny
from tests.wandb_server import serving
from trainer.errors import SetupError
from trainer.wording import flatten

pytest.importorskip("wandb_workspaces")


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The views that a server on this machine was given."""
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        yield server.views


def panels(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for section in spec["section"]["panelBankConfig"]["sections"]:
        yield from section["panels"]


LEFT_OUT = {"step", "eval/samples", "eval/seconds", "eval/perplexity", "eval/copy_bleu"}
"""What a run writes and no chart shows: the axis, how an evaluation went, and what stands beside what is shown."""


def previewed(capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    dashboard(DashboardOptions("translations", preview=True, **options))
    view: dict[str, Any] = json.loads(capsys.readouterr().out)
    return view


def lines(view: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel["config"] for panel in panels(view["spec"]) if panel["viewType"] == "Run History Line Plot"]


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_every_chart_is_of_something_that_a_run_writes(
    run_trainer: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a mixture on two ranks logs and how it scores, as W&B names it."""
    texts = {"greetings": "Guten Tag", "numbers": "eins zwei drei"}
    for name, text in texts.items():
        records = [{"en": f"{text} {number}", "de": f"{text} {number}"} for number in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = [
        f"+data.sources.{name}={{path: {tmp_path}/{name}.jsonl, validation: {tmp_path}/{name}.jsonl}}" for name in texts
    ]
    evaluation = ["eval.every=2", "eval.max_samples=2", "eval.generate=true", "task.max_target_length=16"]
    words = tiny("name=mixed", "steps=2", "engine=zero2", "batch.global_size=8", "data=mixture", *sources, *evaluation)
    done = run_trainer(words, ranks=2).check()
    rows = [json.loads(line) for line in (done.runs_dir / "mixed" / "metrics.jsonl").read_text().splitlines()]
    written = {name for row in rows for name, _ in flatten(row)} - {"event", "split"}

    drawn: set[str] = set()
    for config in lines(previewed(capsys)):
        if config["useMetricRegex"]:
            matched = {name for name in written if re.fullmatch(config["metricRegex"], name)}
            assert matched, f"no metric is called {config['metricRegex']}"
            drawn |= matched
        else:
            drawn |= set(config["metrics"])
        assert config["xAxis"] == "step"
    assert drawn <= written
    assert written - drawn == LEFT_OUT


def test_a_sweep_is_drawn_along_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    view = previewed(capsys, axis=["optimizer.lr", "model.d_model"])
    by_type = {panel["viewType"]: panel["config"] for panel in panels(view["spec"])}
    columns = [column["accessor"] for column in by_type["Parallel Coordinates Plot"]["columns"]]
    assert columns == ["config:optimizer.value.lr", "config:model.value.d_model", "summary:eval/loss"]
    assert by_type["Scatter Plot"]["xAxis"] == "config:optimizer.value.lr"
    assert by_type["Parameter Importance"]["targetKey"] == "eval/loss"
    known = {"optimizer.lr", "batch.global_size", "seed"}
    config = yaml.safe_load((ROOT / "configs" / "train.yaml").read_text())
    assert known - {"optimizer.lr"} <= {name for name, _ in flatten(config)}, "the settings of a sweep by default"


def test_a_server_is_given_the_view(saved: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    dashboard(DashboardOptions("translations", entity="us"))
    assert len(saved) == 1 and saved[0]["projectName"] == "translations" and saved[0]["entityName"] == "us"
    names = [section["name"] for section in json.loads(saved[0]["spec"])["section"]["panelBankConfig"]["sections"]]
    assert names[:6] == ["Learning", "Gradients", "Speed", "Memory", "Data", "Events"]
    assert {"Texts", "Comparison", "Sweep"} <= set(names)
    assert "/us/translations?nw=" in capsys.readouterr().out


def test_without_a_server_the_cure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/dev/null")
    with pytest.raises(SetupError, match=r"did not take the dashboard: .*preview=true"):
        dashboard(DashboardOptions("translations", entity="us"))
