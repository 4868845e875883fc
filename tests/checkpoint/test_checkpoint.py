"""Checkpoints: whole or absent, verified before use, and readable in any split."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from trainer.checkpoint.load import Checkpoint, Reader, find, load, newest, read
from trainer.checkpoint.save import point, prune, save
from trainer.engine.base import Fragment
from trainer.errors import CheckpointError
from trainer.state import TrainState


@dataclass
class OneMatrix:
    """An engine that holds one 4 x 3 matrix and a moment of it."""

    value: torch.Tensor
    shape: tuple[int, ...] = (4, 3)
    replicated = True
    loaded: dict[str, float] | None = None

    def fragments(self):
        yield Fragment("w", "master", 0, self.shape, self.value.view(-1))
        yield Fragment("w", "exp_avg", 0, self.shape, torch.zeros(self.value.numel()))

    def scalars(self):
        return {"step": 7.0}

    def after_load(self, scalars):
        self.loaded = dict(scalars)


def save_steps(root, *steps):
    root.mkdir(parents=True, exist_ok=True)
    for step in steps:
        engine = OneMatrix(torch.full((4, 3), float(step)))
        save(root, engine, TrainState(step=step, tokens=10 * step), {0: {"turn": step}}, {"world_size": 1})


def test_what_was_saved_comes_back(tmp_path):
    save_steps(tmp_path, 3)
    checkpoint = newest(tmp_path)
    assert checkpoint.state == TrainState(step=3, tokens=30)
    assert checkpoint.lanes == {0: {"turn": 3}}
    engine = OneMatrix(torch.zeros(4, 3))
    load(checkpoint, engine)
    assert torch.equal(engine.value, torch.full((4, 3), 3.0))
    assert engine.loaded == {"step": 7.0}
    assert (tmp_path / "latest").read_text().strip() == "step_00000003"


def test_a_save_that_was_killed_is_no_checkpoint(tmp_path):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "step_00000002").rename(tmp_path / ".partial_step_00000002")
    assert newest(tmp_path).state.step == 1
    save_steps(tmp_path, 2)  # the leftover does not stand in the way
    assert newest(tmp_path).state.step == 2
    assert not list(tmp_path.glob(".partial*"))


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "no manifest", "garbled manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(tmp_path, damage):
    save_steps(tmp_path, 1, 2)
    folder = tmp_path / "step_00000002"
    shard = folder / "shard_00000.safetensors"
    content = shard.read_bytes()
    if damage == "truncate":
        shard.write_bytes(content[:-4])
    elif damage == "flip":
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "remove":
        shard.unlink()
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text('{"format": 1,')
    with pytest.raises(CheckpointError, match="step_00000002"):
        read(folder)
    assert newest(tmp_path).state.step == 1


def test_when_all_are_damaged_nothing_starts_from_zero_in_silence(tmp_path):
    save_steps(tmp_path, 1)
    (tmp_path / "step_00000001" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="No whole checkpoint is left"):
        newest(tmp_path)


def test_find_by_name_and_what_exists_is_listed(tmp_path):
    save_steps(tmp_path, 1, 2)
    point(tmp_path, "best", "step_00000001")
    assert [find(tmp_path, which).state.step for which in ("latest", "best", "1", "step_00000002")] == [2, 1, 1, 2]
    with pytest.raises(CheckpointError, match=r"checkpoint=9 .*step_00000001, step_00000002"):
        find(tmp_path, "9")


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4)
    point(tmp_path, "best", "step_00000002")
    prune(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000002", "step_00000004"]
    assert not list(tmp_path.glob(".doomed*"))


def test_a_checkpoint_of_another_model_lists_every_difference(tmp_path):
    save_steps(tmp_path, 1)
    engine = OneMatrix(torch.zeros(2, 3), shape=(2, 3))
    with pytest.raises(CheckpointError, match=r"w \(master\): \(4, 3\) in the checkpoint, \(2, 3\) in the model"):
        load(newest(tmp_path), engine)
    assert torch.equal(engine.value, torch.zeros(2, 3))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(numel=st.integers(1, 40), cuts=st.lists(st.integers(0, 40), max_size=6), data=st.data())
def test_any_range_can_be_read_from_any_split(tmp_path, numel, cuts, data):
    """Shards written by any number of ranks give the same elements to a reader with any other split."""
    folder = tmp_path / "c"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    bounds = sorted({0, numel, *(cut for cut in cuts if cut < numel)})
    whole = torch.arange(numel, dtype=torch.float32)
    files = {}
    for rank, (start, end) in enumerate(pairwise(bounds)):
        name = f"shard_{rank:05d}.safetensors"
        save_file({f"w|master|{start}": whole[start:end].clone()}, folder / name, {"w|master": json.dumps([numel])})
        files[name] = {}
    start = data.draw(st.integers(0, numel - 1))
    end = data.draw(st.integers(start + 1, numel))
    target = torch.full((end - start,), -1.0)
    with Reader(Checkpoint(folder, {"files": files}, TrainState(), {}, {})) as reader:
        reader.read_into("w", "master", start, target)
        assert torch.equal(target, whole[start:end])
        with pytest.raises(CheckpointError, match="elements wanted"):
            reader.read_into("w", "master", start, torch.empty(numel + 1))
