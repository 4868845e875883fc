"""What TensorBoard itself reads back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.errors import SetupError
from trainer.metrics import RunInfo, StepInfo
from trainer.metrics.tensorboard import TensorBoardSink

MakeRun = Callable[..., RunInfo]
MakeStep = Callable[..., StepInfo]


def test_tensorboard_reads_steps_evaluations_and_events(tmp_path: Path, make_run: MakeRun, make_step: MakeStep) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoardSink()
    first.open(make_run())
    for step in (1, 2, 3):
        first.log(make_step(step, loss=3.0))
    first.close("preempted")
    second = TensorBoardSink()
    second.open(make_run(first_step=2))
    second.log(make_step(3, loss=2.0))
    second.log_evaluation(3, {"eval/loss": 1.5, "bleu_signature": "nrefs:1"})
    second.log_evaluation(3, {"split": "test", "eval/loss": 1.25})
    second.event(3, "saved a checkpoint")
    second.close("finished")

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 3.0), (2, 3.0), (3, 2.0)]
    assert [event.value for event in events.Scalars("eval/loss")] == [1.5]
    assert [event.value for event in events.Scalars("test/loss")] == [1.25]
    assert "events/text_summary" in events.Tags()["tensors"]


def test_without_tensorboard_the_extra_is_named(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(SetupError, match=r"shardwright\[tensorboard\]"):
        TensorBoardSink().open(make_run())
