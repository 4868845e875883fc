from __future__ import annotations

import builtins
import json
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from trainer.errors import ConfigError
from trainer.guards.heartbeats import Heartbeat
from trainer.metrics import RunInfo, StepInfo
from trainer.metrics.sinks import SafeSinks
from trainer.metrics.wandb import WandbSink, choose_mode
from trainer.metrics.wandb.alerts import Alerts, Stall

MakeRun = Callable[..., RunInfo]
MakeStep = Callable[..., StepInfo]


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


BLOCK_BYTES = 32 * 1024


def scan(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a 7-byte head, then LevelDB's log format (blocks of pieces: CRC, length, type)."""
    at, record = 7, b""
    while at < len(data):
        if BLOCK_BYTES - at % BLOCK_BYTES < 7:
            at += BLOCK_BYTES - at % BLOCK_BYTES
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def offline_records(directory: Path) -> list[list[Record]]:
    """What W&B wrote, a list for each time the run was opened; complete once its service has ended, as at exit."""
    wandb.teardown()
    paths = sorted(directory.glob("wandb/offline-run-*/run-*.wandb"))
    return [[Record.FromString(record) for record in scan(path.read_bytes())] for path in paths]


def rows(records: list[Record]) -> list[dict[str, Any]]:
    found = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return found


@pytest.mark.usefixtures("no_account")
def test_an_offline_run_holds_config_steps_evaluations_and_samples(
    make_run: MakeRun, make_step: MakeStep, tmp_path: Path
) -> None:
    (tmp_path / "generations").mkdir()
    line = {"source": "a", "reference": "b", "hypothesis": "c"}
    (tmp_path / "generations" / "step_00000002.jsonl").write_text(json.dumps(line) + "\n")
    reports: list[str] = []
    sinks = SafeSinks([WandbSink(project="p")], reports.append)
    sinks.open(make_run())
    sinks.log(make_step(1))
    sinks.log_evaluation(2, {"eval/loss": 1.5})
    sinks.log_evaluation(2, {"split": "test", "eval/loss": 1.75})
    sinks.event(2, "went back to step 0")
    sinks.close("finished")
    assert reports == []
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/events_*.table.json")
    assert json.loads(table.read_text())["data"] == [[2, "went back to step 0"]]

    (records,) = offline_records(tmp_path)
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["model"] == {"_target_": "a.B", "sizes": [1, 2]}, "a real tree, not flattened text"
    assert config["plan"] == {"world_size": 2}
    assert (run.project, run.display_name) == ("p", "trial")

    training, validation, test, *tables = sorted(rows(records), key=lambda row: any("nrows" in name for name in row))
    texts, events = sorted(tables, key=lambda row: "events/nrows" in row)
    assert (events["step"], events["events/nrows"]) == (2, 1)
    assert (training["step"], training["loss"], training["tokens_per_second"]) == (1, 2.5, 12345.6)
    assert "mfu" not in training
    assert (validation["step"], validation["eval/loss"]) == (2, 1.5)
    assert (texts["step"], texts["generations/nrows"]) == (2, 1)
    assert test["test/loss"] == 1.75 and "eval/loss" not in test
    metrics = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in metrics)


@pytest.mark.usefixtures("no_account")
def test_a_resumed_run_keeps_its_id(make_run: MakeRun, make_step: MakeStep, tmp_path: Path) -> None:
    for first_step in (0, 2):
        sink = WandbSink()
        sink.open(make_run(first_step=first_step))
        sink.log(make_step(first_step + 1))
        sink.close("finished")
    files = [path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb")]
    run_id = (tmp_path / "wandb" / "run_id").read_text().strip()
    assert files == [f"run-{run_id}.wandb"] * 2


@pytest.mark.usefixtures("no_account")
def test_without_the_package_the_cure_is_named_and_training_goes_on(
    make_run: MakeRun, make_step: MakeStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def no_wandb(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "wandb":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_wandb)
    reports: list[str] = []
    sinks = SafeSinks([WandbSink()], reports.append)
    sinks.open(make_run())
    sinks.log(make_step(1))
    sinks.close("finished")
    assert len(reports) == 1 and "pip install wandb" in reports[0]


@pytest.mark.usefixtures("no_account")
def test_without_a_key_a_run_that_is_to_be_on_line_is_recorded_off_line(
    make_run: MakeRun, make_step: MakeStep, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sinks = SafeSinks([WandbSink(mode="online")], pytest.fail)
    sinks.open(make_run())
    sinks.log(make_step(1))
    sinks.close("finished")
    assert "there is no key for https://api.wandb.ai; run `wandb login`" in caplog.text
    assert len(offline_records(tmp_path)) == 1


@pytest.mark.usefixtures("no_account")
def test_a_rollback_overwrites_no_row_and_a_resumed_run_counts_on(
    make_run: MakeRun, make_step: MakeStep, tmp_path: Path
) -> None:
    rows_file = tmp_path / "wandb" / "rows.jsonl"
    sinks = SafeSinks([WandbSink()], pytest.fail)
    sinks.open(make_run())
    for step in (1, 2, 3, 4, 3, 4, 5):
        sinks.log(make_step(step))
    sinks.close("finished")
    numbers = [json.loads(line) for line in rows_file.read_text().splitlines()]
    assert [(row["step"], row["row"]) for row in numbers] == [(1, 0), (2, 1), (3, 4), (4, 5), (5, 6)]
    sinks = SafeSinks([WandbSink()], pytest.fail)
    sinks.open(make_run(first_step=4))
    sinks.log(make_step(5))
    sinks.close("finished")
    first, second = offline_records(tmp_path)
    assert [(row["_step"], row["step"]) for row in rows(first)[2:5]] == [(2, 3), (3, 4), (4, 3)]
    assert [(row["_step"], row["step"]) for row in rows(second)] == [(7, 5)]
    assert json.loads(rows_file.read_text().splitlines()[-1]) == {"step": 5, "row": 7}


@pytest.mark.usefixtures("no_account")
def test_disabled_writes_nothing(make_run: MakeRun, make_step: MakeStep, tmp_path: Path) -> None:
    sink = WandbSink(mode="disabled")
    sink.open(make_run())
    sink.log(make_step(1))
    sink.log_evaluation(1, {"eval/loss": 1.0})
    sink.event(1, "hello")
    sink.close("finished")
    assert not (tmp_path / "wandb").exists()


@pytest.mark.usefixtures("no_account")
def test_auto_is_online_only_with_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert choose_mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert choose_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert choose_mode("auto") == "offline", "the key is for another server"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert choose_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode("auto") == "disabled"
    assert choose_mode("offline") == "offline", "what the configuration says outright holds"


@pytest.mark.parametrize(
    "given", [{"mode": "onlin"}, {"artifacts": "referense"}, {"alerts": ["stal"]}], ids=["mode", "artifacts", "alerts"]
)
def test_what_is_not_known_is_refused_with_what_was_meant(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"is not known; did you mean (online|reference|stall)\?"):
        WandbSink(**given)


def test_alerts_of_a_kind_come_seldom_and_tell_how_many_were_held() -> None:
    sent: list[tuple[str, str, str]] = []
    seconds = 0.0
    alerts = Alerts(("alarm", "failure"), 60.0, lambda *alert: sent.append(alert), clock=lambda: seconds)
    for seconds in (0.0, 10.0, 20.0, 61.0):
        alerts.tell("alarm", f"at {seconds:g}")
    alerts.tell("failure", "lost a peer")
    alerts.tell("finish", "nobody asked")
    assert sent == [
        ("Alarm", "at 0", "WARN"),
        ("Alarm", "at 61 (2 more since the last)", "WARN"),
        ("Run failed", "lost a peer", "ERROR"),
    ]


def test_a_run_that_stands_still_is_told_once_with_the_rank_that_is_late(tmp_path: Path) -> None:
    now = 1000.0
    stall = Stall(tmp_path, world_size=2, seconds=30.0, now=lambda: now)

    def beat(rank: int, section: str, since: float, step: int = 7) -> None:
        Heartbeat(rank, "host", 10 + rank, step, section, since, now).write(tmp_path)

    assert stall.look() is None, "there are no signs of life yet"
    now = 1050.0
    beat(0, "agree", 1015.0)
    beat(1, "data", 1010.0)
    assert stall.look() == (
        "rank 1 (host host, pid 11) has been in data of step 7 for 40 s, while 1 rank waits for it in agree of step 7"
    )
    now = 1070.0
    beat(0, "agree", 1015.0)
    assert stall.look() is None, "once for each place"
    beat(0, "evaluate", 1010.0, step=8)
    assert stall.look() is None, "which may take four times as long"


def test_times_that_are_none_are_refused_before_a_file_is_written(run_trainer: Callable[..., Any]) -> None:
    limits = ["logging.wandb.poll_seconds=0", "logging.wandb.start_seconds=-1"]
    done = run_trainer(["experiment=digits_mlp", "name=run", "logging=[wandb]", *limits])
    assert done.returncode == 2 and "poll_seconds=0 of WandbSink is not a time; give seconds above 0" in done.stderr
    assert "start_seconds=-1" in done.stderr and not (done.runs_dir / "run").exists()


@pytest.mark.timeout(150)
def test_a_server_that_takes_connections_and_never_answers_does_not_hold_up_a_run(
    run_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    words = ["experiment=digits_mlp", "steps=30", "log.every=1", "eval.final_split=none", "name=run", "logging=[wandb]"]
    limits = ["logging.wandb.mode=online", "logging.wandb.start_seconds=2", "logging.wandb.finish_seconds=2"]
    with socket.create_server(("127.0.0.1", 0), backlog=128) as silent:  # the kernel accepts, nobody reads
        env = {
            "WANDB_API_KEY": "0" * 40,
            "WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "WANDB_MODE": "online",
        }
        done = run_trainer([*words, *limits], env=env, timeout=120).check()
    run = done.runs_dir / "run"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "loss" in row] == list(range(1, 31))
    assert done.stderr.count("W&B: the run is recorded off line") == 1
    recorded = rows(offline_records(run)[0])
    assert [row["step"] for row in recorded if "loss" in row] == list(range(1, 31))
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 30)
