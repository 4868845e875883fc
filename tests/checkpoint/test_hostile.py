"""Checkpoints and run directories made to do harm: nothing in them is executed, no file elsewhere is touched, and there
is one message."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint.test_checkpoint import OneMatrix, save_steps
from tests.test_training import rows
from trainer.checkpoint.load import Reader, find, load, newest, read
from trainer.composition import compose
from trainer.config import config_from_yaml, config_to_dict, to_config
from trainer.errors import CheckpointError, ConfigError
from trainer.restore import restore_run
from trainer.run_directory import RunDirectory
from trainer.state import TrainState

STEP = "step_00000002"
SHARD = "shard_00000.safetensors"


class Bomb:
    """Creates a file where its pickle is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")


@pytest.fixture
def bombs(tmp_path: Path) -> Iterator[dict[str, bytes]]:
    """Pickles, as `pickle` and as `torch.save` write them, that must never be read as such."""
    mark = tmp_path / "executed"
    torch.save({"weights": Bomb(mark)}, tmp_path / "weights.pt")
    yield {"pickle": pickle.dumps(Bomb(mark)), "torch": (tmp_path / "weights.pt").read_bytes()}
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark))).close()
    assert mark.exists(), "it would have gone off"


_opened: list[str] = []


@pytest.fixture(scope="module")
def audited() -> list[str]:
    """The paths that Python opens."""
    sys.addaudithook(lambda event, arguments: _opened.append(str(arguments[0])) if event == "open" else None)
    return _opened  # the hook stays: Python removes none


@pytest.fixture
def opened(audited: list[str]) -> Iterator[list[str]]:
    """The paths that Python opens, to be cleared before a deed."""
    yield audited
    audited.clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint of step 2, alone in its run."""
    save_steps(tmp_path / "run" / "checkpoints", 2)
    return tmp_path / "run" / "checkpoints" / STEP


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def put(folder: Path, name: str, content: bytes) -> None:
    """Put a file into a checkpoint so that the manifest agrees."""
    (folder / name).write_bytes(content)
    manifest = manifest_of(folder)
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize("name", [SHARD, "state.json", "manifest.json"])
def test_a_pickle_in_place_of_a_file(folder, bombs, name, kind):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(bombs[kind])
    with pytest.raises(CheckpointError, match=name):
        read(folder)
    with pytest.raises(CheckpointError, match="No whole checkpoint is left"):
        newest(folder.parent)
    if name != "manifest.json":
        (folder / name).write_bytes(whole)
        put(folder, name, bombs[kind])  # by somebody who knows of the hashes
        with pytest.raises(CheckpointError, match=f"{name} .*it is damaged"):
            load(read(folder), OneMatrix(torch.zeros(4, 3)))


def test_pickles_beside_the_files_are_never_opened(folder, bombs, opened):
    beside = ("weights.pt", "pytorch_model.bin", "optimizer.pkl", "rng.pth", "data.npy", "shard_00001.safetensors")
    for name in beside:
        (folder / name).write_bytes(bombs["torch"])
        (folder.parent / name).write_bytes(bombs["torch"])
    (folder / "__init__.py").write_text("raise SystemExit")
    opened.clear()
    engine = OneMatrix(torch.zeros(4, 3))
    load(newest(folder.parent), engine)
    assert torch.equal(engine.value, torch.full((4, 3), 2.0))
    assert {Path(path).name for path in opened} <= {"manifest.json", "state.json", SHARD}


def test_a_pickle_that_the_manifest_lists_is_hashed_and_no_more(folder, bombs):
    put(folder, "weights.pt", bombs["torch"])
    engine = OneMatrix(torch.zeros(4, 3))
    load(newest(folder.parent), engine)
    assert torch.equal(engine.value, torch.full((4, 3), 2.0))


@pytest.mark.parametrize("name", ["../../outside", "{outside}", "sub/file", "..", ".", "", "manifest.json", "a\0b"])
def test_a_manifest_that_names_other_places(folder, tmp_path, opened, name):
    outside = tmp_path / "run" / "outside"
    outside.write_text("secret")
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text("secret")
    manifest = manifest_of(folder)
    facts = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    manifest["files"][name.replace("{outside}", str(outside))] = facts
    (folder / "manifest.json").write_text(json.dumps(manifest))
    opened.clear()
    with pytest.raises(CheckpointError, match="no file of its folder"):
        read(folder)
    assert {Path(path) for path in opened} == {folder / "manifest.json"}


@pytest.mark.parametrize("name", [SHARD, "state.json", "manifest.json"])
def test_a_link_to_a_file_elsewhere(folder, tmp_path, opened, name):
    elsewhere = (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(elsewhere)
    opened.clear()
    with pytest.raises(CheckpointError, match="is a link to a file elsewhere"):
        read(folder)
    assert folder / name not in {Path(path) for path in opened}


ODD = [None, True, -1, 1.5, "1", [], {}, [1], {"a": 1}, "x" * 10**5, 10**400]


@pytest.mark.parametrize("path", ["", "train", "optimizer", "lanes", "train.step", "train.tokens", "train.losses",
                                  "train.best", "optimizer.step", "lanes.0", "lanes.x"])  # fmt: skip
def test_a_state_with_odd_values(folder, path):
    for value in ODD:
        state = json.loads((folder / "state.json").read_text())
        holder, *keys = [state, *filter(None, path.split("."))]
        for key in keys[:-1]:
            holder = holder[key]
        if keys:
            holder[keys[-1]] = value
        put(folder, "state.json", json.dumps(state if keys else value).encode())
        try:
            found = read(folder)
        except CheckpointError as error:
            assert "state.json" in str(error) and len(str(error)) < 1000
        else:
            assert found.state == TrainState.from_dict(state["train"])
            assert type(found.state.step) is int and found.state.step >= 0
            assert all(type(lane) is int and isinstance(place, dict) for lane, place in found.lanes.items())
            assert all(isinstance(number, int | float) for number in found.scalars.values())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"[" * 10**5,
        b'{"format": 1}',
        b'{"format": 1, "files": [1]}',
        b'{"format": 1, "files": {"state.json": 3}}',
        b'{"format": 1, "files": {"state.json": {"bytes": "6", "sha256": "x"}}}',
        b'{"format": 1, "files": {"state.json": {"bytes": 6, "sha256": ["x"]}}}',
        b'{"format": "one"}',
        b'{"format": 1, "files": {"a": ' + b"9" * 10**5 + b"}}",
    ],
)
def test_a_manifest_of_another_form(folder, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json") as caught:
        read(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"w|master": torch.zeros(12)}, {"w|master": "[4, 3]"}),
        ({"w|master|x": torch.zeros(12)}, {"w|master": "[4, 3]"}),
        ({"w|master|-5": torch.zeros(12)}, {"w|master": "[4, 3]"}),
        ({"w|master|0": torch.zeros(4, 3)}, {"w|master": "[4, 3]"}),
        ({"w|master|0": torch.zeros(12)}, {"w|master": "4"}),
        ({"w|master|0": torch.zeros(12)}, {"w|master": "[-4, -3]"}),
        ({"w|master|0": torch.zeros(12)}, {"w|master": "[" * 10**5}),
        ({"w|master|0": torch.zeros(12)}, {"w": "[4, 3]"}),
        ({"w|master|0": torch.zeros(12)}, {}),
        ({"w|master|0|2:1": torch.zeros(12)}, {"w|master": "[4, 3]"}),
        ({"w|master|0|0:9": torch.zeros(12)}, {"w|master": "[4, 3]"}),
        ({"w|master|0|0": torch.zeros(12)}, {"w|master": "[4, 3]"}),
    ],
)
def test_tensors_of_another_form(folder, tmp_path, tensors, metadata):
    save_file(tensors, tmp_path / "made", metadata)
    put(folder, SHARD, (tmp_path / "made").read_bytes())
    with pytest.raises(CheckpointError, match=f"{SHARD} holds no tensors as a save writes them"):
        load(read(folder), OneMatrix(torch.zeros(4, 3)))


def test_a_shape_beyond_all_memory_is_not_believed(folder, tmp_path):
    save_file({"w|master|0": torch.zeros(12)}, tmp_path / "made", {"w|master": "[1000000000, 1000000000]"})
    put(folder, SHARD, (tmp_path / "made").read_bytes())
    with Reader(read(folder)) as reader, pytest.raises(CheckpointError, match="has 12 of the 1000000000000000000"):
        list(reader.whole())


@pytest.mark.parametrize("pointer", ["latest", "best"])
@pytest.mark.parametrize("content", [b"../../elsewhere", b"/etc", b"..", b"\x80\x04K\x01.", b"", b"step_2/../.."])
def test_a_pointer_to_another_place(folder, bombs, opened, pointer, content):
    save_steps(folder.parents[2] / "elsewhere", 2)
    (folder.parent / pointer).write_bytes(content)
    opened.clear()
    with pytest.raises(CheckpointError, match=f"checkpoint={pointer} does not exist in .*{STEP}"):
        find(folder.parent, pointer)
    assert {Path(path).name for path in opened} == {pointer}
    (folder.parent / pointer).write_bytes(bombs["pickle"])
    with pytest.raises(CheckpointError, match="does not exist"):
        find(folder.parent, pointer)


@pytest.mark.parametrize("which", ["../../elsewhere", "/etc", ".."])
def test_a_checkpoint_asked_for_by_another_place(folder, which):
    with pytest.raises(CheckpointError, match="does not exist"):
        find(folder.parent, which)


@pytest.mark.parametrize("name", ["../run", "/etc", "..", "a/../../b", ""])
def test_a_run_asked_for_by_another_place(tmp_path, name):
    with pytest.raises(ConfigError, match="is no name of a run"):
        restore_run(name, str(tmp_path))


def test_code_that_a_run_allows_itself_is_not_built(tmp_path):
    """The list that counts is the one of the command line that uses the run."""
    config = config_to_dict(to_config(compose(["experiment=quickstart"])))
    config |= {"model": {"_target_": "os.system", "command": f"touch {tmp_path}/executed"}, "allow_targets": ["os."]}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"model\._target_=os\.system is code outside"):
        restore_run("run", str(tmp_path))
    with pytest.raises(CheckpointError, match="does not exist"):  # the next thing that is looked for
        restore_run("run", str(tmp_path), allow_targets=["[os.]"])
    assert not (tmp_path / "executed").exists()


def test_pickles_in_place_of_what_a_run_is_made_of(tmp_path, bombs):
    directory = RunDirectory(tmp_path)
    for content in (*bombs.values(), b"!!python/object/apply:os.system ['touch executed']\n", b"\xff", b"[" * 10**4):
        directory.config.write_bytes(content)
        directory.tokenizer.write_bytes(content)
        with pytest.raises(ConfigError, match=r"config\.yaml") as refused:
            config_from_yaml(directory.config)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json.*Restore the file") as damaged:
            directory.read_tokenizer()
        assert len(str(refused.value)) < 1000 and len(str(damaged.value)) < 1000
    assert not Path("executed").exists()


@pytest.mark.timeout(120)
def test_pickles_in_place_of_what_a_run_writes_are_cut_or_replaced(run_trainer, bombs):
    words = [
        *("experiment=digits_mlp", "schedule=constant", "checkpoint.every=2", "log.every=1", "eval.final_split=none"),
        *("data.trace=true", "logging=[]", "name=run", "steps=2"),
    ]
    done = run_trainer(words).check()
    run = done.runs_dir / "run"
    for name in ("metrics.jsonl", "quarantine.jsonl", "anomalies.jsonl", "status.json", "overrides.yaml", "plan.json",
                 "ds_config.json", "evaluation.json", "logs/rank_00000.log", "heartbeats/rank_00000.json",
                 "samples/rank_00000.jsonl", "checkpoints/weights.pt", "weights.pt"):  # fmt: skip
        (run / name).write_bytes(bombs["pickle"])
    again = run_trainer([*words, "steps=3"]).check()
    assert "after step 2" in again.stdout
    assert [row["step"] for row in rows(done.runs_dir, "run") if "loss" in row] == [3]
