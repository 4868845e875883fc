"""W&B on line: the real client against a server on this machine, outages included."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb

from tests.wandb_server import WandbServer, serving
from trainer.metrics import RunInfo, StepInfo
from trainer.metrics.sinks import SafeSinks
from trainer.metrics.wandb import WandbSink

MakeRun = Callable[..., RunInfo]
MakeStep = Callable[..., StepInfo]

SHORT = {
    f"WANDB__{what}_{name}_SECONDS": value
    for what in ("FILE_STREAM", "FILE_TRANSFER", "GRAPHQL")
    for name, value in (("RETRY_WAIT_MIN", "0.1"), ("RETRY_WAIT_MAX", "0.2"), ("TIMEOUT", "2"))
} | {"WANDB__DISABLE_STATS": "true", "WANDB__DISABLE_META": "true"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    with serving() as found:
        environment = {"WANDB_BASE_URL": found.url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online", **SHORT}
        for name, value in (environment | {"WANDB_DATA_DIR": str(tmp_path / "data")}).items():
            monkeypatch.setenv(name, value)
        wandb.teardown()  # what it remembers of another server
        yield found
        found.fault = None
        wandb.teardown()


def save(directory: Path, step: int) -> Path:
    """As much of a checkpoint as W&B looks at."""
    folder = directory / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"step": step}))
    (folder / "shard_00000.safetensors").write_bytes(bytes(100))
    (folder.parent / "best").write_text(f"{folder.name}\n")
    return folder


def write_texts(directory: Path, step: int) -> None:
    (directory / "generations").mkdir(exist_ok=True)
    line = json.dumps({"source": "a", "reference": "b", "hypothesis": f"c{step}"})
    (directory / "generations" / f"step_{step:08d}.jsonl").write_text(line + "\n")


def steps_of(server: WandbServer) -> list[int]:
    """The steps of the history, without the rows of tables, which come when they can."""
    numbers = [row["_step"] for row in server.run.history]
    assert numbers == sorted(set(numbers)), "no row stands in the place of another"
    return [row["step"] for row in server.run.history if not {"generations", "events"} & row.keys()]


def test_a_run_is_complete_over_outages_and_goes_on_where_its_checkpoint_was(
    server: WandbServer, make_run: MakeRun, make_step: MakeStep, tmp_path: Path
) -> None:
    reports: list[str] = []
    wishes: list[str] = []
    slowest = 0.0

    def start(first_step: int, **given: Any) -> SafeSinks:
        sinks = SafeSinks([WandbSink("p", poll_seconds=0.2, group="g", tags=["a"], **given)], reports.append)
        sinks.open(replace(make_run(first_step=first_step), ask_to_stop=wishes.append))
        return sinks

    def train(sinks: SafeSinks, *steps: int) -> None:
        nonlocal slowest
        for step in steps:
            began = time.perf_counter()
            sinks.log(make_step(step))
            if step % 4 == 0:
                write_texts(tmp_path, step)
                sinks.log_evaluation(step, {"eval/loss": 1.5})
                sinks.saved(step, save(tmp_path, step))
            slowest = max(slowest, time.perf_counter() - began)

    sinks = start(0)
    train(sinks, *range(1, 5))
    server.wait_for(lambda: server.artifact(f"trial-{server.run.name}:step-4") is not None)
    for fault in (503, "hang", "reset"):
        met, server.fault = server.faults_met, fault
        server.wait_for(lambda before=met: server.faults_met > before)  # W&B looks for tags, at least
        first = 5 + 4 * (503, "hang", "reset").index(fault)
        train(sinks, *range(first, first + 4))
        sinks.alarm(first, f"a spike while the server is at {fault}")
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000004")  # as pruning does
    assert slowest < 0.25, "no step waited for the server"
    server.fault = None
    server.wait_for(lambda: server.artifact(f"trial-{server.run.name}:step-16") is not None, 60)
    server.run.tags.append("stop")
    server.wait_for(lambda: bool(wishes))
    (tmp_path / "status.json").write_text(json.dumps({"step": 16, "reason": "steps: 16 of 16"}))
    met, server.fault = server.faults_met, 503
    mending = threading.Thread(target=lambda: server.mend(lambda: server.faults_met > met + 3))
    mending.start()
    sinks.close("finished")  # which uploads all rows
    mending.join()

    run = server.run
    assert reports == [] and len(wishes) == 1 and "tag stop" in wishes[0]
    assert (run.project, run.fields["displayName"], run.fields["groupName"]) == ("p", "trial", "g")
    assert run.fields["jobType"] == "train" and run.config["model"] == {"_target_": "a.B", "sizes": [1, 2]}
    evaluated = sorted([*range(1, 17), 4, 8, 12, 16])
    assert steps_of(server) == evaluated, "complete, in order"
    assert sum("generations" in row for row in run.history) == 4
    assert (run.summary["status"], run.summary["step"], run.complete, run.exit_code) == ("finished", 16, True, 0)
    alerts = {alert["title"]: alert["text"] for alert in run.alerts}
    assert len(run.alerts) == 2 and alerts["Alarm"] == "trial: a spike while the server is at 503", "one in 300 s"
    assert alerts["Run ended"] == "trial: finished; step 16: steps: 16 of 16"

    name = f"trial-{run.name}"
    versions = [one for one in server.artifacts.values() if one.name == name and not one.deleted]
    assert [sorted(one.aliases) for one in versions] == [["step-8"], ["step-12"], ["best", "latest", "step-16"]]
    assert all(one.committed and one.type == "model" for one in versions)
    files, metadata = versions[-1].manifest["contents"], json.loads(versions[-1].fields["metadata"])
    assert files["checkpoint/shard_00000.safetensors"]["ref"].startswith(f"file://{tmp_path}/checkpoints/step_00000016")
    assert metadata["step"] == 16 and len(metadata["manifest_sha256"]) == 64 and metadata["config"]["seed"] == 7
    tables = [one for one in server.artifacts.values() if one.type == "run_table"]
    *texts, events = tables
    assert len(texts) == 4 and b"c16" in texts[-1].files["generations.table.json"]
    assert b"a spike while the server is at hang" in events.files["events.table.json"]

    run.tags.clear()
    sinks = start(12)
    train(sinks, 13, 14)
    sinks.close("preempted")
    assert len(run.rewound) == 1
    assert steps_of(server) == [*(step for step in evaluated if step <= 12), 13, 14]
    server.rewinds = False
    sinks = start(13)
    train(sinks, 14, 15)
    sinks.close("finished")
    assert steps_of(server) == [*(step for step in evaluated if step <= 12), 13, 14, 14, 15], "nothing is overwritten"
    assert reports == [] and len(server.runs) == 1


def test_what_the_server_has_not_got_at_the_end_comes_by_wandb_sync(
    server: WandbServer, make_run: MakeRun, make_step: MakeStep, tmp_path: Path
) -> None:
    reports: list[str] = []
    sinks = SafeSinks([WandbSink(finish_seconds=1.0, stop_tag=None)], reports.append)
    sinks.open(make_run())
    server.fault = 503
    for step in range(1, 31):
        sinks.log(make_step(step))
    sinks.close("finished")
    assert len(reports) == 1 and "the upload did not end within 1 s" in reports[0]
    wandb.teardown()
    server.fault = None
    told = reports[0].partition("`")[2].rstrip("`").split()
    assert told[:3] == ["wandb", "sync", "--include-online"]
    subprocess.run(told, check=True, capture_output=True)
    assert steps_of(server) == list(range(1, 31))


@pytest.mark.parametrize(
    ("status", "words", "cure"),
    [
        (401, "user is not logged in", r"refuses the key .* `wandb login --relogin`"),
        (404, "entity nobody not found", r"no place for this run .* logging\.wandb\.entity=nobody"),
        (None, "", r"does not take the run .* the network and WANDB_BASE_URL"),
    ],
)
def test_a_run_that_is_refused_is_recorded_off_line_and_the_cure_is_told(
    status: int | None,
    words: str,
    cure: str,
    server: WandbServer,
    make_run: MakeRun,
    make_step: MakeStep,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if status is None:
        server.fault = "hang"
    else:
        server.refusal = status, words
    reports: list[str] = []
    sinks = SafeSinks([WandbSink(entity="nobody", start_seconds=1.0)], reports.append)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        sinks.open(make_run())
    assert time.monotonic() - began < 15
    sinks.log(make_step(1))
    sinks.close("finished")
    assert reports == [] and server.runs == {}
    (warning,) = (record.message for record in caplog.records if record.name.startswith("trainer."))
    assert "recorded off line" in warning and f"wandb sync --include-online {tmp_path}" in warning
    assert re.search(cure, warning), warning
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_runs_off_line_come_later_and_whole_however_often_they_were_resumed(
    server: WandbServer,
    make_run: MakeRun,
    make_step: MakeStep,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first_step, steps in ((0, range(1, 5)), (2, range(3, 7))):
        sinks = SafeSinks([WandbSink()], pytest.fail)
        sinks.open(make_run(first_step=first_step))
        for step in steps:
            sinks.log(make_step(step))
        if first_step == 0:
            write_texts(tmp_path, 4)
            sinks.log_evaluation(4, {"eval/loss": 1.5})
            sinks.saved(4, save(tmp_path, 4))
        sinks.close("finished")
    wandb.teardown()
    assert server.asked == []
    monkeypatch.setenv("WANDB_MODE", "online")
    sinks = SafeSinks([WandbSink()], pytest.fail)  # its history must not overtake what was recorded before
    with caplog.at_level(logging.WARNING):
        sinks.open(make_run(first_step=6))
    sinks.log(make_step(7))
    sinks.close("finished")
    assert "was recorded off line" in caplog.text
    wandb.teardown()
    subprocess.run(["wandb", "sync", str(tmp_path / "wandb")], check=True, capture_output=True)
    assert steps_of(server) == [1, 2, 3, 4, 4, 3, 4, 5, 6, 7]
    assert server.run.complete and server.run.summary["status"] == "finished"
    assert server.artifact(f"trial-{server.run.name}:step-4") is not None
    assert sum("generations" in row for row in server.run.history) == 1


@pytest.mark.dist
@pytest.mark.timeout(400)
def test_a_tag_stops_all_ranks_at_one_step_and_what_uses_the_run_has_its_checkpoint_as_input(
    server: WandbServer, run_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    env = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online", **SHORT}
    words = ["experiment=digits_mlp", "steps=100000", "log.every=50", "eval.final_split=none", "name=run"]
    words += ["logging=[wandb]", "logging.wandb.poll_seconds=0.2", "engine=zero1", "precision=fp32"]
    directory = tmp_path / "runs" / "run"

    def tag() -> None:
        server.wait_for(lambda: (directory / "metrics.jsonl").is_file() and bool(server.runs), 200)
        server.wait_for(lambda: bool((directory / "metrics.jsonl").read_text()), 100)
        server.run.tags.append("stop")

    somebody = threading.Thread(target=tag)
    somebody.start()
    done = run_trainer(words, ranks=2, env=env, timeout=240).check()
    somebody.join()
    status = json.loads((directory / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 0), "no launcher begins it again"
    assert "the tag stop of the W&B run" in status["reason"] and 0 < status["step"] < 100_000
    assert (directory / "checkpoints" / f"step_{status['step']:08d}" / "manifest.json").is_file()
    (trained,) = server.runs.values()
    assert trained.complete and [alert["title"] for alert in trained.alerts] == ["Run ended"]

    place = f"runs_dir={done.runs_dir}"
    run_trainer(["run=run", place, "split=validation"], module="trainer.evaluate", env=env).check()
    (evaluated,) = (run for run in server.runs.values() if run is not trained)
    assert (
        evaluated.fields["jobType"] == "evaluate"
        and evaluated.used == [name for name in trained.logged if "-events:" not in name][-1:]
    )
    assert evaluated.history[0]["step"] == status["step"] and "eval/loss" in evaluated.history[0]
    assert evaluated.complete
