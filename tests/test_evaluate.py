"""Evaluation in one process, and on ranks with different numbers of sentences (this file is their program, too)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from trainer import distributed
from trainer.errors import ConfigError, DataError, SetupError
from trainer.evaluate import Evaluation, check_enough_samples, evaluate, main
from trainer.plan import RunPlan
from trainer.tasks import IGNORE, Encoded
from trainer.tasks.translation import Translation

VOCABULARY = 259
PAIRS = [
    ("the cat sat", "die Katze sass"),
    ("a dog", "ein Hund"),
    ("we go", "wir gehen"),
    ("home", "heim"),
    ("so", "so"),
]


class ByteTokenizer:
    pad_id, bos_id, eos_id = 0, 1, 2

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[3 + byte for byte in text.encode()] for text in texts]

    @property
    def for_targets(self) -> ByteTokenizer:
        return self

    def decode(self, ids: list[int]) -> str:
        return bytes(token - 3 for token in ids if token > 2).decode(errors="replace")

    def decode_batch(self, ids: list[list[int]]) -> list[str]:
        return [self.decode(one) for one in ids]


@dataclass
class State:
    """Position and sources of the rows; what `CopyModel` needs to know."""

    sources: torch.Tensor
    position: int = 0
    first_ids: torch.Tensor | None = None

    def select(self, row_indices: torch.Tensor) -> State:
        return State(self.sources[row_indices], self.position)


class CopyModel(torch.nn.Module):
    """Copies the source with fixed confidence. With `collective`, each pass waits for all ranks, as ZeRO-3's does."""

    max_positions = None

    def __init__(self, collective: bool = False) -> None:
        super().__init__()
        self.confidence = torch.nn.Parameter(torch.tensor(6.0))
        self.collective = collective

    def _logits(self, sources: torch.Tensor) -> torch.Tensor:
        if self.collective:
            dist.all_reduce(torch.zeros(1))
        return torch.nn.functional.one_hot(sources, VOCABULARY) * self.confidence

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        length = batch["labels"].shape[1]
        sources = batch["source_ids"].masked_fill(~batch["source_mask"], 2)
        return self._logits(torch.nn.functional.pad(sources, (0, length), value=2)[:, :length])

    def start_decoding(self, batch: Mapping[str, torch.Tensor]) -> State:
        sources = batch["source_ids"].masked_fill(~batch["source_mask"], 2)
        return State(torch.nn.functional.pad(sources, (0, 100), value=2))

    def decode_step(self, state: State, token_ids: torch.Tensor) -> torch.Tensor:
        logits = self._logits(state.sources[:, state.position])
        state.position += 1
        return logits


class Engine:
    """The part of an engine that evaluation uses."""

    def __init__(self, together: bool = False) -> None:
        self.module = self.model = CopyModel(collective=together)
        self.ranks_must_step_together = together

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with torch.no_grad():
            yield


@dataclass
class Sample:
    index: int
    record: Mapping[str, Any]
    encoded: Encoded
    task: Translation


class Data:
    """Deals `PAIRS` to the ranks in turn."""

    def __init__(self, pairs: Sequence[tuple[str, str]] = PAIRS) -> None:
        self.records = [{"en": source, "de": target} for source, target in pairs]

    def evaluation_samples(self, split: str, rank: int, world_size: int, max_samples: int | None) -> list[Sample]:
        samples = []
        task = make_task()
        for index, (record, encoded) in enumerate(zip(self.records, task.encode(self.records), strict=True)):
            assert isinstance(encoded, Encoded)
            if index % world_size == rank and (max_samples is None or index < max_samples):
                samples.append(Sample(index, record, encoded, task))
        return samples


class Scored(Translation):
    """Also measures the mean length of the targets, by a forward pass of its own."""

    def batch_scores(self, model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
        targets = (batch["labels"] != IGNORE) & torch.isfinite(model(batch)).all(-1)
        return {"target_length": (float(targets.sum()), float(targets.any(dim=1).sum()))}


def make_task() -> Translation:
    return Scored(ByteTokenizer(), "en", "de", beam_size=2, max_source_length=40, max_target_length=40)


def make_plan(micro_size: int | None = 2, micro_tokens: int | None = None) -> RunPlan:
    return RunPlan(1, 2, 2, micro_size, 1, micro_tokens, "fp32", "plain", 0, "none", "none", None)


def run(directory: Path, together: bool = False, data: Data | None = None, **options: Any) -> dict[str, float]:
    plan = options.pop("plan", make_plan())
    evaluation = Evaluation(options.pop("split", "validation"), options.pop("max_samples", None), plan, **options)
    return evaluate(Engine(together), make_task(), data or Data(), evaluation, directory, step=40)


def expected_loss() -> tuple[float, int, int]:
    """(nll, target tokens, correct ones), worked out byte by byte."""
    log_sum = math.log(math.exp(6.0) + VOCABULARY - 1)
    nll, tokens, correct = 0.0, 0, 0
    for source, target in PAIRS:
        copied = [3 + byte for byte in source.encode()] + [2] * 100
        for position, label in enumerate([*(3 + byte for byte in target.encode()), 2]):
            nll += log_sum - 6.0 * (copied[position] == label)
            tokens += 1
            correct += copied[position] == label
    return nll, tokens, correct


def test_loss_is_weighted_by_target_tokens(tmp_path: Path) -> None:
    metrics = run(tmp_path)
    nll, tokens, correct = expected_loss()
    num_bytes = sum(len(target.encode()) for _, target in PAIRS)
    assert metrics["eval/loss"] == pytest.approx(nll / tokens, rel=1e-6)
    assert metrics["eval/perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-6)
    assert metrics["eval/accuracy"] == correct / tokens
    assert metrics["eval/target_length"] == tokens / len(PAIRS)
    assert metrics["eval/bits_per_byte"] == pytest.approx(nll / math.log(2) / num_bytes, rel=1e-6)
    assert metrics["eval/samples"] == 5
    assert metrics["eval/seconds"] > 0


def test_every_sentence_is_translated_once_in_the_order_of_the_split(tmp_path: Path) -> None:
    metrics = run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "generations" / "step_00000040.jsonl").read_text().splitlines()]
    assert [(line["source"], line["reference"]) for line in lines] == PAIRS
    assert [line["hypothesis"] for line in lines] == [source for source, _ in PAIRS]
    assert metrics["eval/bleu"] == metrics["eval/copy_bleu"], "this model copies"
    assert 0 < metrics["eval/chrf"] < 100


def test_the_micro_batch_does_not_matter(tmp_path: Path) -> None:
    plans = [make_plan(1), make_plan(5), make_plan(None, micro_tokens=40), make_plan(None, micro_tokens=1)]
    results = [run(tmp_path / str(index), plan=plan) for index, plan in enumerate(plans)]
    for result in results[1:]:
        for name in result.keys() - {"eval/seconds"}:
            assert result[name] == pytest.approx(results[0][name], rel=1e-6), name


def test_without_generation_only_the_loss_is_measured(tmp_path: Path) -> None:
    metrics = run(tmp_path, generate=False)
    assert "eval/loss" in metrics and "eval/bleu" not in metrics
    assert list(tmp_path.iterdir()) == []


def test_the_final_evaluation_leaves_its_figures_and_signatures(tmp_path: Path) -> None:
    metrics = run(tmp_path, split="test", final=True)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["step"] == 40 and written["split"] == "test"
    assert {name: written[name] for name in metrics} == metrics
    assert "tok:13a" in written["bleu_signature"] and "nc:6" in written["chrf_signature"]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "evaluation.json",
        "step_00000040.test.jsonl",
    ]


def test_max_samples_takes_the_first(tmp_path: Path) -> None:
    assert run(tmp_path, max_samples=3)["eval/samples"] == 3


def test_an_empty_split_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="split validation has no usable sample"):
        run(tmp_path, data=Data([]))


def test_a_run_directory_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "generations").write_text("a file where a folder should be")
    with pytest.raises(SetupError, match=r"Cannot write .*generations"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("num_samples", "max_samples", "error", "message"),
    [
        (3, None, ConfigError, "has 3 samples for 4 ranks; use at most 3 ranks"),
        (4, 2, ConfigError, "eval.max_samples=2 is less than the 4 ranks; use at least 4"),
        (0, None, DataError, "has no usable sample"),
    ],
)
def test_more_ranks_than_samples_are_refused_before_training(
    num_samples: int, max_samples: int | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_enough_samples("test", num_samples, max_samples, world_size=4)
    check_enough_samples("test", 4, 4, world_size=4)


SHARES = {"one_rank_has_none": 2, "one_rank_has_two": 4, "all": None}
"""Samples that three ranks share."""


@pytest.mark.dist
@pytest.mark.parametrize("together", [False, True])
def test_ranks_with_unequal_shares_agree_with_one_process(
    together: bool, tmp_path: Path, free_port: int, trainer_env: dict[str, str]
) -> None:
    """Where a forward pass is collective, unequal numbers of them would hang."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "WORLD_SIZE": "3"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path), str(int(together))],
            env={**trainer_env, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(3)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    file = Path("generations", "step_00000040.jsonl")
    for share, max_samples in SHARES.items():
        alone = run(tmp_path / "alone" / share, max_samples=max_samples)
        results = [json.loads((tmp_path / f"{share}.{rank}.json").read_text()) for rank in range(3)]
        assert results[0] == results[1] == results[2]
        for name in alone.keys() - {"eval/seconds"}:
            assert results[0][name] == pytest.approx(alone[name], rel=1e-6), name
        assert (tmp_path / share / file).read_text() == (tmp_path / "alone" / share / file).read_text()


def test_command_line_refuses_unknown_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run=x", "splitt=test"]) == 2
    assert "did you mean split?" in capsys.readouterr().err


def test_command_line_names_the_run_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run=nowhere", f"runs_dir={tmp_path}"]) == 2
    assert "run=nowhere" in capsys.readouterr().err


def worker(directory: Path, together: bool) -> None:
    """What each rank of the test above does."""
    torch.set_num_threads(1)
    with distributed.process_group(timeout_seconds=60):
        for share, max_samples in SHARES.items():
            metrics = run(directory / share, together, max_samples=max_samples, plan=make_plan(micro_size=1))
            (directory / f"{share}.{distributed.rank()}.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    worker(Path(sys.argv[1]), bool(int(sys.argv[2])))
