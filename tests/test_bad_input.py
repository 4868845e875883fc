"""Wrong input to a real run: exit code 2, one message with key, value and cure, no traceback, nothing half-written."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

PAIRS = [{"en": f"number {i}", "de": f"Nummer {i}"} for i in range(200)]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A folder of good data: train, validation and test, 200 pairs each."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        write(folder / f"{split}.jsonl", PAIRS)
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def on(folder: Path, *words: str) -> list[str]:
    return [
        "experiment=quickstart",
        "data=files",
        f"data.path={folder}",
        "name=run",
        "steps=2",
        "schedule.warmup=1",
        "eval.every=0",
        "batch.global_size=48",
        "tokenizer.vocab_size=300",
        "logging=[]",
        *words,
    ]


def refused(done, *parts: str, code: int = 2) -> None:
    assert done.returncode == code, done.output
    assert code != 2 or "Traceback" not in done.output  # torchrun shows one of its own
    for part in parts:
        assert part in done.stderr, done.stderr
    assert not (done.runs_dir / "run").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["optimiser.lr=1"], ["optimiser.lr", "did you mean optimizer.lr"]),
        (["steps=many"], ["steps='many'", "whole number"]),
        (["engine=zero9"], ["zero9", "zero1, zero2, zero3"]),
        (["batch.micro_size=36"], ["batch.micro_size=36", "use batch.micro_size=24 or 48"]),
        (["precision=fp16"], ["precision=fp16", "CPU", "precision=bf16"]),
        (["task.max_target_length=2000"], ["2000", "model.max_positions=512"]),
        (["model.vocab_size=100"], ["model.vocab_size=100", "set model.vocab_size="]),
        (["task.target_column=fr"], ["fr", "en, de"]),
        (["data.train=missing"], ["missing", "train.jsonl"]),
        (["optimizer=adafactor", "engine=zero2"], ["optimizer=adafactor", "engine=plain"]),
        (["name=../up"], ["../up"]),
        (["resume=must"], ["resume=must", "resume=auto"]),
        (["data.lanes=7", "data.block=0"], ["data.block=0", "at least 1"]),
    ],
)
def test_a_run_that_cannot_be_is_refused(run_trainer, pairs, words, parts):
    refused(run_trainer(on(pairs, *words)), *parts)


def test_the_last_that_torchrun_says_is_the_message(run_trainer, pairs):
    done = run_trainer(on(pairs, "batch.global_size=7"), ranks=2, launcher="torchrun")
    assert done.returncode == 1
    cure = "batch.global_size=7 does not divide over 2 ranks; use batch.global_size=6 or 8."
    assert cure in "".join(done.stderr.splitlines()[-2:])


def test_missing_data_tells_what_lies_there(run_trainer, tmp_path):
    refused(run_trainer(on(tmp_path / "nothing")), "nothing")


def test_a_file_that_is_not_what_its_name_says(run_trainer, pairs):
    (pairs / "train.jsonl").unlink()
    (pairs / "train.parquet").write_bytes(gzip.compress(b"no parquet"))
    refused(run_trainer(on(pairs)), "train.parquet")


def test_an_empty_split(run_trainer, pairs):
    (pairs / "test.jsonl").write_text("")
    refused(run_trainer(on(pairs)), "test", "empty")


def test_more_ranks_than_samples_to_evaluate(run_trainer, pairs):
    write(pairs / "test.jsonl", PAIRS[:1])
    launcher_code = 1  # torchrun's own, whatever the ranks' was
    refused(run_trainer(on(pairs), ranks=2), "test", "1 samples for 2 ranks", code=launcher_code)
    words = on(pairs, "eval.final_split=none", "eval.every=1", "eval.max_samples=1")
    refused(run_trainer(words, ranks=2), "max_samples=1", code=launcher_code)


@pytest.mark.dist
def test_a_model_that_cannot_be_split_over_the_ranks(run_trainer, pairs):
    words = on(pairs, "engine.tensor_parallel=2", "model.d_ff=33")
    refused(run_trainer(words, ranks=2), "engine.tensor_parallel=2", "33 d_ff", "Choose a divisor", code=1)


@pytest.mark.parametrize("runs_dir", ["file/runs", "/proc/runs"])
def test_a_folder_that_cannot_be_written(run_trainer, pairs, tmp_path, runs_dir):
    (tmp_path / "file").write_text("in the way")
    done = run_trainer(on(pairs, f"runs_dir={runs_dir}"))
    refused(done, "runs_dir=", "choose another runs_dir")


def test_a_run_directory_of_another_configuration_is_shown_the_difference_and_left_alone(run_trainer, pairs):
    done = run_trainer(on(pairs)).check()
    before = {path: path.read_bytes() for path in (done.runs_dir / "run").rglob("*") if path.is_file()}
    again = run_trainer(on(pairs, "optimizer.lr=0.5"))
    assert again.returncode == 2 and "Traceback" not in again.output
    assert "optimizer.lr: 0.003 -> 0.5" in again.stderr
    never = run_trainer(on(pairs, "resume=never"))
    assert never.returncode == 2 and "resume=never" in never.stderr
    assert {path: path.read_bytes() for path in (done.runs_dir / "run").rglob("*") if path.is_file()} == before


def test_the_same_command_again_has_nothing_left_to_do(run_trainer, pairs):
    done = run_trainer(on(pairs)).check()
    metrics = (done.runs_dir / "run" / "metrics.jsonl").read_text()
    again = run_trainer(on(pairs)).check()
    assert "resuming" in again.stdout and "after step 2" in again.stdout
    assert (done.runs_dir / "run" / "metrics.jsonl").read_text().startswith(metrics)
    losses = [json.loads(line) for line in (done.runs_dir / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in losses if "loss" in row] == [1]
    assert sum("eval/bleu" in row for row in losses) == 1
