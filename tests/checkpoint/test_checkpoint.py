"""Checkpoints: whole or absent, verified before use, and readable in any split."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from trainer.checkpoint.load import Checkpoint, Reader, find, load, newest, read, set_aside
from trainer.checkpoint.pieces import write_pieces
from trainer.checkpoint.save import Checkpointer, _take_snapshot, point, prune
from trainer.config import CheckpointConfig
from trainer.engine.base import Fragment
from trainer.errors import CheckpointError
from trainer.state import TrainState


@dataclass
class OneMatrix:
    """An engine that holds one 4 x 3 matrix and a moment of it."""

    value: torch.Tensor
    shape: tuple[int, ...] = (4, 3)
    fragments_stay = True
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
        checkpointer = Checkpointer(root, engine, {"world_size": 1}, CheckpointConfig(keep=9), lambda *_: None)
        checkpointer.save(TrainState(step=step, tokens=10 * step), {0: {"turn": step}})
        checkpointer.require()


@pytest.mark.parametrize("stay", [True, False])
def test_what_is_saved_is_the_step_and_not_the_next_one(tmp_path, stay):
    """The copy is made beside the next forward pass; the update after `settle` changes nothing of it."""
    engine = OneMatrix(torch.full((4_000_000, 3), 5.0), shape=(4_000_000, 3))
    engine.fragments_stay = stay
    checkpointer, _ = checkpointer_of(tmp_path, engine)
    for step in (1, 2, 3):
        engine.value.fill_(step)
        checkpointer.save(TrainState(step=step), {})
        checkpointer.settle()
        engine.value.fill_(-1.0)
        checkpointer.require()
        with Reader(newest(tmp_path)) as reader:
            (_, values) = next(reader.whole())
        assert bool((values == step).all())


def test_the_latest_is_found_after_a_damaged_one_was_set_aside(tmp_path):
    save_steps(tmp_path, 3, 5)
    shard = tmp_path / "step_00000005" / "shard_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    set_aside(tmp_path, 3)
    assert find(tmp_path, "latest").state.step == 3


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
    (tmp_path / ".partial_step_00000009").mkdir()  # of a step that is not saved again
    save_steps(tmp_path, 2)  # the leftovers do not stand in the way
    assert newest(tmp_path).state.step == 2
    assert not list(tmp_path.glob(".partial*"))


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "no manifest", "garbled manifest", "no text"])
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
    elif damage == "no text":
        (folder / "manifest.json").write_bytes(b'{"format": 1, "files": \xff')
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


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


@dataclass
class OneRow(OneMatrix):
    """A rank that holds some rows of a matrix."""

    rank: int = 0

    def fragments(self):
        for key in ("master", "exp_avg"):
            yield Fragment("w", key, self.rank * self.value.numel(), self.shape, self.value.view(-1))


@pytest.mark.parametrize(("ranks", "rank", "opened"), [(8, 5, 1), (4, 2, 2), (1, 0, 8), (8, 0, 1), (8, 7, 1)])
def test_a_rank_opens_the_shards_that_it_needs_alone(tmp_path, monkeypatch, ranks, rank, opened):
    """Eight ranks wrote; those of a job of the same shape read their own file, others as few as will do."""
    files = {f"shard_{one:05d}.safetensors": {} for one in range(8)}
    for one, name in enumerate(files):
        tensors = {f"w|{key}|{3 * one}": torch.full((3,), float(one)) for key in ("master", "exp_avg")}
        save_file(tensors, tmp_path / name, {"w|master": "[8, 3]", "w|exp_avg": "[8, 3]"})
    names = []
    open_one = Reader._open
    monkeypatch.setattr(Reader, "_open", lambda self, path: (names.append(path.name), open_one(self, path))[1])
    monkeypatch.setattr("trainer.distributed.rank", lambda: rank)
    monkeypatch.setattr("trainer.distributed.world_size", lambda: ranks)
    rows = 8 // ranks
    engine = OneRow(torch.zeros(rows, 3), shape=(8, 3), rank=rank)
    load(Checkpoint(tmp_path, {"files": files}, TrainState(), {}, {}), engine)
    assert engine.value[:, 0].tolist() == list(range(rank * rows, (rank + 1) * rows))
    assert len(names) == opened


def test_of_a_parameter_that_many_ranks_share_one_tells_its_shape(tmp_path):
    """Or rank 0 would be told as many shapes as there are parameters, times ranks."""
    snapshots = [_take_snapshot(OneRow(torch.zeros(1, 3), shape=(4, 3), rank=rank), TrainState(), {}, True)
                 for rank in range(4)]  # fmt: skip
    assert [dict(one.shapes) for one in snapshots] == [{"w": [4, 3]}, {}, {}, {}]
    assert all(one.metadata["w|master"] == "[4, 3]" for one in snapshots)


@pytest.fixture
def held(monkeypatch):
    """Holds the writing thread, which has been given all there is to write, until it is let go."""
    let_go = threading.Event()

    def slow(path, sizes, pieces, metadata):
        taken = [(key, tensor.clone()) for key, tensor in pieces]
        assert let_go.wait(30)
        write_pieces(path, sizes, taken, metadata)

    monkeypatch.setattr("trainer.checkpoint.save.write_pieces", slow)
    return let_go


def checkpointer_of(root, engine, **options):
    told = []
    config = CheckpointConfig(**{"keep": 9, **options})
    return Checkpointer(root, engine, {}, config, lambda *facts: told.append(facts)), told


def test_training_goes_on_while_a_checkpoint_is_written_and_it_holds_the_step_it_was_begun_at(tmp_path, held):
    engine = OneMatrix(torch.full((4, 3), 1.0))
    checkpointer, told = checkpointer_of(tmp_path, engine)
    checkpointer.save(TrainState(step=1), {0: {"turn": 1}})
    checkpointer.settle()
    engine.value.fill_(2.0)  # the next step
    assert not checkpointer.written and newest(tmp_path) is None and not told
    held.set()
    checkpointer.finish()
    assert told == [(1, None)]
    loaded = OneMatrix(torch.zeros(4, 3))
    load(newest(tmp_path), loaded)
    assert torch.equal(loaded.value, torch.full((4, 3), 1.0))


@dataclass
class TwoMatrices(OneMatrix):
    """An engine that holds another matrix, which is written after the first."""

    def fragments(self):
        yield from super().fragments()
        yield Fragment("last", "master", 0, self.shape, self.value.view(-1))


def test_what_a_slow_disk_has_not_taken_when_the_update_comes_is_copied(tmp_path, monkeypatch):
    engine = TwoMatrices(torch.full((4, 3), 1.0))
    checkpointer, _ = checkpointer_of(tmp_path, engine)
    copied, begun = {}, threading.Event()

    def slow(path, sizes, pieces, metadata):
        def taken():
            for key, tensor in pieces:
                copied[key] = tensor.data_ptr() != engine.value.data_ptr()
                begun.set()
                yield key, tensor
                assert checkpointer._awaited.wait(30)

        write_pieces(path, sizes, taken(), metadata)

    monkeypatch.setattr("trainer.checkpoint.save.write_pieces", slow)
    checkpointer.save(TrainState(step=1), {})
    assert begun.wait(30)
    checkpointer.settle()
    engine.value.fill_(2.0)
    checkpointer.require()
    with Reader(newest(tmp_path)) as reader:
        assert all(bool((values == 1.0).all()) for name, values in reader.whole() if name in ("w", "last"))
    assert copied == {"w|master|0": False, "w|exp_avg|0": True, "last|master|0": True}


def test_a_run_that_is_killed_while_writing_keeps_the_checkpoint_before(tmp_path):
    save_steps(tmp_path, 1)
    script = (
        "import os, torch, threading\n"
        "import trainer.checkpoint.save as save\n"
        "from tests.checkpoint.test_checkpoint import OneMatrix, checkpointer_of\n"
        "from pathlib import Path\n"
        "from trainer.state import TrainState\n"
        "def die(path, *rest):\n"
        "    Path(path).write_bytes(b'half'); os._exit(9)\n"
        "save.write_pieces = die\n"
        f"c, _ = checkpointer_of(Path({str(tmp_path)!r}), OneMatrix(torch.ones(4, 3)))\n"
        "c.save(TrainState(step=2), {})\n"
        "c.finish()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 9
    assert newest(tmp_path).state.step == 1
    save_steps(tmp_path, 2)
    assert newest(tmp_path).state.step == 2 and not list(tmp_path.glob(".partial*"))


def test_a_full_disk_is_told_and_the_run_goes_on(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("trainer.checkpoint.save.write_pieces", full)
        checkpointer, told = checkpointer_of(tmp_path, OneMatrix(torch.ones(4, 3)))
        checkpointer.save(TrainState(step=2), {})
        checkpointer.finish()
        ((step, failure),) = told
        assert step == 2 and "rank 0: [Errno 28] No space left on device" in failure
        assert newest(tmp_path).state.step == 1
        with pytest.raises(CheckpointError, match="The checkpoint before it is valid; make room"):
            checkpointer.require()
    checkpointer.save(TrainState(step=3), {})
    checkpointer.require()
    assert newest(tmp_path).state.step == 3 and not list(tmp_path.glob(".partial*"))


def test_some_checkpoints_are_kept_for_good(tmp_path):
    checkpointer, _ = checkpointer_of(tmp_path, OneMatrix(torch.ones(4, 3)), keep=2, keep_every=10, asynchronous=False)
    for step in range(5, 40, 5):
        checkpointer.save(TrainState(step=step), {}, best=step == 15)
    assert sorted(int(path.name[5:]) for path in tmp_path.glob("step_*")) == [10, 15, 20, 30, 35]


def test_damaged_checkpoints_are_set_aside_so_that_their_steps_are_saved_anew(tmp_path, caplog):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "step_00000002" / "state.json").unlink()
    found = newest(tmp_path)
    set_aside(tmp_path, found.state.step)
    assert found.state.step == 1 and "state.json is missing" in caplog.text
    assert [path.name for path in tmp_path.glob(".damaged*")] == [".damaged_step_00000002"]
    save_steps(tmp_path, 2)
    assert newest(tmp_path).state.step == 2
