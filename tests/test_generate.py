from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trainer.restore
from tests.test_training import tiny
from trainer.errors import DataError
from trainer.generate import generate_texts, main
from trainer.tasks import AS_SET, BadRecord, Decoding, Encoded


class Shout:
    """A task that writes its prompt in capitals; it cannot take "?" and notes what it was asked."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.asked = AS_SET

    def encode_prompts(self, texts: Sequence[str]) -> list[Encoded | BadRecord]:
        return [
            BadRecord("it is a question") if "?" in text else Encoded({"text": text}, len(text), 0)  # type: ignore[dict-item]
            for text in texts
        ]

    def generate(
        self,
        model: Any,
        samples: Sequence[Encoded],
        all_finished: Any = None,
        how: Decoding = AS_SET,
    ) -> list[str]:
        assert torch.is_inference_mode_enabled()
        self.batches.append([sample.length for sample in samples])
        self.asked = how
        return [str(sample.fields["text"]).upper() for sample in samples]


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Shout:
    """The task of every run that is restored."""
    task = Shout()
    run = {"config": SimpleNamespace(logging={}), "directory": SimpleNamespace(path=None), "steps": [1]}
    restored = SimpleNamespace(task=task, model=torch.nn.Identity(), **run)
    monkeypatch.setattr(trainer.restore, "restore_run", lambda *_: restored)
    return task


def test_results_come_in_the_order_of_the_texts_though_batches_are_by_length() -> None:
    task = Shout()
    texts = ["long one here", "a", "", "middle", "bb"]
    assert generate_texts(task, torch.nn.Identity(), texts, AS_SET, batch_size=2) == [
        "LONG ONE HERE",
        "A",
        "",
        "MIDDLE",
        "BB",
    ]
    assert task.batches == [[1, 2], [6, 13]]


def test_a_text_that_cannot_be_used_is_named_by_its_number() -> None:
    with pytest.raises(DataError, match="Text 2 of 3 cannot be used: it is a question"):
        generate_texts(Shout(), torch.nn.Identity(), ["a", "b?", "c"], AS_SET)


def test_texts_of_the_command_line(task: Shout, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run=r", "text=one", "text=two", "beam_size=5", "max_length=9"]) == 0
    assert capsys.readouterr().out == "ONE\nTWO\n"
    assert task.asked == Decoding(beam_size=5, max_length=9)
    assert main(["run=r", "text=one", "temperature=0.5", "top_p=0.9", "seed=3"]) == 0
    assert task.asked == Decoding(temperature=0.5, top_p=0.9, seed=3) and task.asked.samples


def test_ranks_share_the_batches_and_all_have_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["long one here", "a", "", "middle", "bb"]
    told: list[dict[int, str]] = []
    monkeypatch.setattr("trainer.distributed.world_size", lambda: 2)
    monkeypatch.setattr("trainer.distributed.all_gather_objects", lambda mine: [*told, told.append(mine) or mine])
    for rank in (0, 1):
        monkeypatch.setattr("trainer.distributed.rank", lambda rank=rank: rank)
        task = Shout()
        written = generate_texts(task, torch.nn.Identity(), texts, AS_SET, batch_size=2)
        assert len(task.batches) == 1
    assert written == ["LONG ONE HERE", "A", "", "MIDDLE", "BB"]


@pytest.mark.usefixtures("task")
def test_at_a_terminal_it_asks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter(["one", "why?", "two", ""])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    assert main(["run=r"]) == 0
    told = capsys.readouterr()
    assert told.out == "ONE\nTWO\n" and "it is a question" in told.err


@pytest.mark.usefixtures("task")
def test_searching_and_sampling_at_once_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run=r", "text=one", "beam_size=2", "temperature=1"]) == 2
    assert "beam_size=2 searches, and temperature" in capsys.readouterr().err


@pytest.mark.usefixtures("task")
def test_a_file_line_by_line_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("über\n\nlast\n", encoding="utf-8")
    assert main(["run=r", f"input={tmp_path}/in.txt", f"output={tmp_path}/out.txt"]) == 0
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == "ÜBER\n\nLAST\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.txt"]


@pytest.mark.usefixtures("task")
def test_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert main(["run=r", "input=-"]) == 0
    assert capsys.readouterr().out == "FROM A PIPE\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give text="),
        (["txet=a"], "did you mean text?"),
        (["text=a", "beam_size=0"], "beam_size=0 must be at least 1"),
        (["text=a?"], "Text 1 of 1 cannot be used"),
        (["input=missing.txt"], "input=missing.txt cannot be read"),
    ],
)
@pytest.mark.usefixtures("task")
def test_what_cannot_be_done_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run=r", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_a_run_that_writes_no_text_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    restored = SimpleNamespace(task=object(), model=torch.nn.Identity())
    monkeypatch.setattr(trainer.restore, "restore_run", lambda *_: restored)
    assert main(["run=digits", "text=a"]) == 2
    assert "run=digits: its task object does not generate text" in capsys.readouterr().err


@pytest.mark.dist
@pytest.mark.slow
def test_a_model_spread_over_ranks_writes_the_same(run_trainer) -> None:
    """Three batches for two ranks, whose texts end at different lengths."""
    runs = run_trainer(tiny("steps=3", "precision=fp32", "name=run")).check().runs_dir
    words = ["run=run", f"runs_dir={runs}", "batch_size=2", "max_length=12", "beam_size=2"]
    words += [
        f"text={text}" for text in ("Turn on the light", "Off", "The name of the house is", "A", "Home assistant")
    ]
    alone = run_trainer(words, module="trainer.generate").check()
    spread = run_trainer([*words, "sharded=true"], ranks=2, module="trainer.generate").check()
    lines = alone.stdout.splitlines()
    assert len(lines) == 5 and len(set(lines)) > 1
    assert spread.stdout.splitlines()[-5:] == lines
