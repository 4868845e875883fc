"""The W&B workspace: what the library would send, and sending it to a server on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest

from launch.dashboard import DashboardOptions, dashboard
from tests.wandb_server import serving
from trainer.errors import SetupError
from trainer.metrics import StepInfo

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


def test_every_chart_is_of_something_that_runs_log(capsys: pytest.CaptureFixture[str]) -> None:
    dashboard(DashboardOptions("translations", preview=True))
    view = json.loads(capsys.readouterr().out)
    assert view["project"] == "translations" and view["displayName"] == "Shardwright"
    lines = [panel["config"] for panel in panels(view["spec"]) if panel["viewType"] == "Run History Line Plot"]
    logged = {field.name for field in fields(StepInfo)}
    drawn = {metric for config in lines for metric in config["metrics"]}
    assert {metric for metric in drawn if not metric.startswith("eval/")} - logged == {"data.bad_record"}
    assert logged - drawn == {"step", "data"}, "everything that is logged is drawn"
    assert {config["xAxis"] for config in lines} == {"step"}


def test_a_server_is_given_the_view(saved: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    dashboard(DashboardOptions("translations", entity="us"))
    assert len(saved) == 1 and saved[0]["projectName"] == "translations" and saved[0]["entityName"] == "us"
    names = [section["name"] for section in json.loads(saved[0]["spec"])["section"]["panelBankConfig"]["sections"]]
    assert names[:5] == ["Learning", "Speed", "Memory", "Data", "Events"] and {"Texts", "Comparison"} <= set(names)
    assert "/us/translations?nw=" in capsys.readouterr().out


def test_without_a_server_the_cure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/dev/null")
    with pytest.raises(SetupError, match=r"did not take the dashboard: .*preview=true"):
        dashboard(DashboardOptions("translations", entity="us"))
