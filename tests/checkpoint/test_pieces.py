"""A blocking save writes from where the engine holds its state, and the file is the same."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.test_checkpoint import OneMatrix
from trainer.checkpoint.pieces import write_pieces
from trainer.checkpoint.save import Checkpointer
from trainer.config import CheckpointConfig
from trainer.state import TrainState


def test_what_was_written_one_by_one_is_a_safetensors_file(tmp_path):
    tensors = {f"w{n}|master|0": torch.randn(n) for n in (1, 5, 1000)} | {"x|master|3": torch.empty(0)}
    sizes = {key: tensor.numel() for key, tensor in tensors.items()}
    write_pieces(tmp_path / "shard.safetensors", sizes, tensors.items(), {"w1|master": "[1]"})
    loaded = load_file(tmp_path / "shard.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())


def test_pieces_in_another_order_are_not_written_under_wrong_names(tmp_path):
    with pytest.raises(AssertionError, match=r"b .*instead of a"):
        write_pieces(tmp_path / "shard", {"a": 1, "b": 1}, [("b", torch.ones(1)), ("a", torch.ones(1))], {})


def test_a_blocking_save_writes_the_same_as_one_in_the_background(tmp_path):
    saved = {}
    for asynchronous in (True, False):
        root = tmp_path / str(asynchronous)
        root.mkdir()
        engine = OneMatrix(torch.arange(12.0).view(4, 3))
        checkpointer = Checkpointer(root, engine, {}, CheckpointConfig(asynchronous=asynchronous), lambda *_: None)
        checkpointer.save(TrainState(step=1), {})
        checkpointer.require()
        saved[asynchronous] = load_file(root / "step_00000001" / "shard_00000.safetensors")
    assert saved[True].keys() == saved[False].keys()
    assert all(torch.equal(saved[True][key], tensor) for key, tensor in saved[False].items())
