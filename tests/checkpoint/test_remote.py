"""Copies of checkpoints on remote storage: a run goes on from them as from its own, and is never held up by them."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest
import torch
import yaml

from tests.checkpoint.test_checkpoint import OneMatrix, save_steps
from tests.conftest import find_free_port
from tests.data.servers import Fault, FaultyServer, serving
from tests.test_config import facts, part
from tests.test_training import curve, rows
from trainer.checkpoint.copies import begin, make_copier
from trainer.checkpoint.load import newest, read
from trainer.checkpoint.remote import RemoteRun
from trainer.checkpoint.save import Checkpointer
from trainer.config import Config, config_to_dict, to_config
from trainer.errors import CheckpointError, ConfigError, SetupError
from trainer.run_directory import RunDirectory
from trainer.state import TrainState

TINY = (
    *("experiment=digits_mlp", "schedule=constant", "model.dropout=0.1", "batch.global_size=32", "steps=8"),
    *("checkpoint.every=2", "checkpoint.keep=2", "log.every=1", "eval.final_split=none", "logging=[]", "name=run"),
    *("checkpoint.remote=s3://bucket/runs", "data.retry_seconds=1"),
)


class Going(FaultyServer):
    """In front of a store, and down from the time on when a file whose path ends in `last` was sent."""

    last = ""

    def next_fault(self, method: str) -> Fault | None:
        if self.always is None and self.last and any(put.split("?")[0].endswith(self.last) for put in self.puts()):
            self.always = Fault(503)
            return None  # the one that was sent
        return self.always

    def puts(self) -> list[str]:
        return [path for method, path, _ in list(self.requests) if method == "PUT"]


@pytest.fixture(scope="module")
def moto() -> Iterator[tuple[str, int]]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    storage = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    storage.start()
    yield storage.get_host_and_port()
    storage.stop()
    storage._server.server_close()


@pytest.fixture
def store(moto: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """An S3 service with an empty bucket `bucket`. server: stands before it; env: for processes; client: boto3's."""
    with serving(Going(upstream=moto)) as server:
        env = {
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # it would talk to the server of the test before
        client = boto3.client("s3", endpoint_url=f"http://{moto[0]}:{moto[1]}")
        client.create_bucket(Bucket="bucket")
        yield SimpleNamespace(server=server, env=env, client=client)
        for entry in client.list_objects_v2(Bucket="bucket").get("Contents", []):
            client.delete_object(Bucket="bucket", Key=entry["Key"])


def names(store: SimpleNamespace) -> set[str]:
    return {entry["Key"] for entry in store.client.list_objects_v2(Bucket="bucket").get("Contents", [])}


def steps(store: SimpleNamespace) -> list[int]:
    """Of the checkpoints in the store that have a manifest."""
    found = (name.split("/")[-2] for name in names(store) if name.endswith("/manifest.json"))
    return sorted(int(name.removeprefix("step_")) for name in found)


@pytest.mark.timeout(300)
def test_a_run_whose_disk_is_lost_goes_on_from_its_newest_whole_copy(run_trainer, store):
    """The copy of step 8 has no manifest, as of an upload that was cut short; the run repeats the steps after 6."""
    done = run_trainer(TINY, env=store.env).check()
    assert steps(store) == [6, 8], "the newest two are kept, as in the run directory"
    last = rows(done.runs_dir, "run")[-2]
    assert last == {"step": 8, "event": "the checkpoints up to step_00000008 are also in s3://bucket/runs/run"}
    whole = curve(done.runs_dir, "run")
    shutil.rmtree(done.runs_dir / "run")
    store.client.delete_object(Bucket="bucket", Key="runs/run/checkpoints/step_00000008/manifest.json")
    again = run_trainer([*TINY, "resume=must"], env=store.env).check()
    assert "after step 6" in again.stdout and "step_00000008 has no manifest" in again.stderr
    assert len(whole) == 8 and curve(again.runs_dir, "run") == whole
    assert steps(store) == [6, 8] and newest(again.runs_dir / "run" / "checkpoints").state.step == 8
    other = run_trainer([*TINY, "optimizer.lr=0.1"], env=store.env, cwd=again.runs_dir)
    assert other.returncode == 2 and "optimizer.lr: 0.3 -> 0.1" in other.stderr


@pytest.mark.timeout(300)
def test_a_store_that_goes_down_never_stops_training_and_the_next_start_makes_up_for_it(run_trainer, store):
    words = [*TINY, "steps=800", "checkpoint.every=200", "log.every=40"]
    store.server.last = "/manifest.json"
    done = run_trainer(words, env=store.env).check()
    assert steps(store) == [200] and newest(done.runs_dir / "run" / "checkpoints").state.step == 800
    assert len(curve(done.runs_dir, "run")) == 21
    events = [row["event"] for row in rows(done.runs_dir, "run") if "event" in row]
    assert any("step_00000800 was not copied to s3://bucket/runs/run: HTTP 503" in event for event in events), events
    status = json.loads((done.runs_dir / "run" / "status.json").read_text())
    assert status["state"] == "finished" and "secret" not in done.output
    store.server.last, store.server.always = "", None
    run_trainer(words, env=store.env).check()
    assert steps(store) == [600, 800]


def config_of(tmp_path: Path, remote: str | None = None, **changes) -> Config:
    remote = remote or f"file://{tmp_path / 'backup'}"
    checkpoint = {"remote": remote, "keep": changes.pop("keep", 2), "keep_every": changes.pop("keep_every", None)}
    data = part(retry_seconds=0.2)
    return to_config(facts(name="run", runs_dir=str(tmp_path / "runs"), checkpoint=checkpoint, data=data, **changes))


def saved_run(config: Config, *saved: int, best: int | None = None) -> RunDirectory:
    """A run directory with checkpoints of these steps, copied while they were made."""
    directory = RunDirectory.of(config)
    directory.claim(config, [], {}, {}, None)
    copier = make_copier(config, directory)
    engine = OneMatrix(torch.ones(4, 3))
    checkpointer = Checkpointer(directory.checkpoints, engine, {}, config.checkpoint, lambda *_: None, copier)
    for step in saved:
        engine.value.fill_(step)
        checkpointer.save(TrainState(step=step), {}, best=step == best)
        checkpointer.finish()
        while copier.wait(1.0) is not None:
            pass
    checkpointer.require()
    return directory


def copied(tmp_path: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (tmp_path / "backup/run/checkpoints").glob("step_*"))


def test_copies_are_pruned_by_the_rules_of_the_run_directory(tmp_path):
    config = config_of(tmp_path, keep=2, keep_every=10)
    directory = saved_run(config, 4, 6, 8, 10, 12, 14, 16, best=6)
    assert copied(tmp_path) == [6, 10, 14, 16]
    assert sorted(int(path.name[5:]) for path in directory.checkpoints.glob("step_*")) == [6, 10, 14, 16]
    backup = tmp_path / "backup" / "run"
    assert (backup / "checkpoints/latest").read_text() == "step_00000016\n"
    assert (backup / "checkpoints/best").read_text() == "step_00000006\n"
    shutil.rmtree(directory.path)
    assert begin(config, directory).state.step == 16
    assert (directory.checkpoints / "latest").read_text() == "step_00000016\n" and directory.config.exists()
    saved_run(config, 18)
    assert copied(tmp_path) == [6, 10, 16, 18], "the best stays, though it was not fetched"


def test_an_older_or_damaged_run_directory_takes_the_copy_and_a_newer_one_does_not(tmp_path):
    config = config_of(tmp_path)
    directory = saved_run(config, 2, 4)
    shard = directory.checkpoints / "step_00000004" / "shard_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert begin(config, directory).state.step == 4
    assert read(directory.checkpoints / "step_00000004").state.step == 4
    shutil.rmtree(directory.checkpoints / "step_00000004")
    assert begin(config, directory).state.step == 4
    save_steps(directory.checkpoints, 6)
    assert begin(config, directory).state.step == 6


def test_a_damaged_copy_is_named_and_the_one_before_it_is_taken(tmp_path, caplog):
    config = config_of(tmp_path)
    directory = saved_run(config, 2, 4)
    shutil.rmtree(directory.path)
    copy = tmp_path / "backup/run/checkpoints/step_00000004/shard_00000.safetensors"
    copy.write_bytes(copy.read_bytes()[:-1] + b"?")
    assert begin(config, directory).state.step == 2
    assert "step_00000004" in caplog.text and "does not match the SHA-256" in caplog.text
    assert not list(directory.checkpoints.glob(".fetched*"))
    shutil.rmtree(directory.path)
    shutil.rmtree(tmp_path / "backup/run/checkpoints/step_00000002")
    with pytest.raises(CheckpointError, match="No whole checkpoint is left in file://"):
        begin(config, directory)


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "..", "manifest.json", ".hidden", "a\\b", ""])
def test_a_copy_whose_manifest_names_other_places_is_not_fetched(tmp_path, name):
    config = config_of(tmp_path)
    directory = saved_run(config, 2)
    shutil.rmtree(directory.path)
    path = tmp_path / "backup/run/checkpoints/step_00000002/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = manifest["files"]["state.json"]
    path.write_text(json.dumps(manifest))
    before = set(tmp_path.rglob("*"))
    assert begin(config, directory) is None
    assert set(tmp_path.rglob("*")) == before


def test_the_copy_counts_for_what_resume_says(tmp_path):
    directory = saved_run(config_of(tmp_path), 2)
    shutil.rmtree(directory.path)
    with pytest.raises(ConfigError, match=r"resume=never, but file://.*/backup/run exists"):
        begin(config_of(tmp_path, resume="never"), directory)
    with pytest.raises(ConfigError, match=r"(?s)file://.*another configuration.*seed: 0 -> 1"):
        begin(config_of(tmp_path, seed=1), directory)
    assert not directory.path.exists()
    assert begin(config_of(tmp_path, resume="must"), directory).state.step == 2
    with pytest.raises(CheckpointError, match=r"resume=must, but neither .* nor file://.* holds a checkpoint"):
        begin(config_of(tmp_path, remote=f"file://{tmp_path}/other", resume="must"), RunDirectory(tmp_path / "none"))


def test_a_store_that_does_not_answer_stops_only_a_run_that_has_nothing_else(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{find_free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    config = config_of(tmp_path, remote="s3://bucket/runs")
    directory = RunDirectory.of(config)
    with pytest.raises(CheckpointError, match=r"s3://bucket/runs/run cannot be asked .*checkpoint\.remote=null"):
        begin(config, directory)
    save_steps(directory.checkpoints, 2)
    assert begin(config, directory).state.step == 2
    assert "cannot be asked for checkpoints" in caplog.text


def test_a_bucket_that_is_not_there_is_told_at_the_start(tmp_path, store):
    config = config_of(tmp_path, remote="s3://missing/runs")
    with pytest.raises(CheckpointError, match="s3://missing/runs/run cannot be asked for checkpoints"):
        begin(config, RunDirectory.of(config))


def test_a_url_that_takes_no_copies_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"checkpoint\.remote=https://host/x: web servers take no files"):
        begin(config_of(tmp_path, remote="https://host/x"), RunDirectory(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"checkpoint\.remote: nonsense://x/run: Protocol not known"):
        begin(config_of(tmp_path, remote="nonsense://x"), RunDirectory(tmp_path / "run"))

    def refuse(*args, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("trainer.data.remote.fsspec.core.url_to_fs", refuse)
    with pytest.raises(SetupError, match=r"checkpoint\.remote: s3://b/run: .*pip install shardwright\[s3\]"):
        begin(config_of(tmp_path, remote="s3://b"), RunDirectory(tmp_path / "run"))


def test_what_is_being_sent_is_not_pruned_and_an_older_upload_makes_way(tmp_path, monkeypatch):
    """The disk keeps one checkpoint; the first is spared until it is there, then goes, here and there."""
    real, begun, let_go = RemoteRun._put, threading.Event(), threading.Event()

    def slow(self, path, name):
        begun.set()
        assert let_go.wait(30)
        real(self, path, name)

    monkeypatch.setattr(RemoteRun, "_put", slow)
    config = config_of(tmp_path, keep=1)
    directory = RunDirectory.of(config)
    directory.claim(config, [], {}, {}, None)
    copier = make_copier(config, directory)
    engine = OneMatrix(torch.ones(4, 3))
    checkpointer = Checkpointer(directory.checkpoints, engine, {}, config.checkpoint, lambda *_: None, copier)
    for step in (1, 2, 3):
        checkpointer.save(TrainState(step=step), {})
        checkpointer.finish()
        assert begun.wait(30)
    assert [path.name[-1] for path in sorted(directory.checkpoints.glob("step_*"))] == ["1", "3"]
    let_go.set()
    checkpointer.require()
    assert [path.name[-1] for path in directory.checkpoints.glob("step_*")] == ["3"] and copied(tmp_path) == [3]


def test_the_configuration_goes_along(tmp_path):
    config = config_of(tmp_path)
    saved_run(config, 2)
    assert yaml.safe_load((tmp_path / "backup/run/config.yaml").read_text()) == config_to_dict(config)


def test_another_save_of_the_same_step_replaces_the_copy(tmp_path):
    config = config_of(tmp_path)
    directory = saved_run(config, 2)
    first = (tmp_path / "backup/run/checkpoints/step_00000002/manifest.json").read_bytes()
    shutil.rmtree(directory.checkpoints / "step_00000002")
    engine = OneMatrix(torch.full((4, 3), 9.0))
    checkpointer = Checkpointer(directory.checkpoints, engine, {}, config.checkpoint, lambda *_: None)
    checkpointer.save(TrainState(step=2), {})
    checkpointer.finish()
    copier = make_copier(config, directory)
    while copier.wait(1.0) is not None:
        pass
    assert (tmp_path / "backup/run/checkpoints/step_00000002/manifest.json").read_bytes() != first
