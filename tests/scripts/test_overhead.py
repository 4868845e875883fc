"""The gate: what the trainer costs beside a bare loop, measured in turn."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import pytest
from bench import overhead

from trainer import loop

TINY = (
    *("tokenizer=byte", "tokenizer.vocab_size=260", "data.block=8", "batch.global_size=16", "precision=fp32"),
    *("model.d_model=32", "model.num_heads=2", "model.d_ff=64", "model.encoder_layers=1", "model.decoder_layers=1"),
    *("task.max_source_length=256", "task.max_target_length=256"),
)


def test_a_wait_in_the_loop_shows_in_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = loop._measure

    def waiting(*arguments: object) -> None:
        time.sleep(0.2)
        measured(*arguments)  # type: ignore[arg-type]

    ratios = overhead.measure(TINY, pairs=2)
    assert len(ratios) == 2 and all(ratio > 0 for ratio in ratios)
    monkeypatch.setattr(loop, "_measure", waiting)
    slowed = overhead.measure(TINY, pairs=2)
    assert max(slowed) < min(ratios)


def test_a_gate_measures_again_before_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(medians: Iterator[float]) -> list[int]:
        asked: list[int] = []

        def measure(words: Sequence[str], pairs: int) -> list[float]:
            asked.append(pairs)
            return [next(medians)] * pairs

        monkeypatch.setattr(overhead, "measure", measure)
        return asked

    arguments = ["--pairs", "4", "--threads", "1", "--at-least", "0.95"]
    asked = told(iter([0.96, 0.96]))
    assert overhead.main(arguments) == 0 and asked == [4, 4]
    asked = told(iter([0.94, 0.96, 0.96]))
    assert overhead.main(arguments) == 0 and asked == [4, 12, 4]
    asked = told(iter([0.94, 0.94, 0.96]))
    assert overhead.main(arguments) == 1 and asked == [4, 12, 4]
