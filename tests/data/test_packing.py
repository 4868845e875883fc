"""Packed rows are full, hold every sample once, and no sample is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.fakes import LengthTask, MemorySource, loader_of, memory_data, steps_of
from trainer.data.packing import pack
from trainer.data.stream import StreamData
from trainer.data.tokenizer import TrainedTokenizer
from trainer.errors import ConfigError
from trainer.tasks.causal_lm import CausalLM
from trainer.tasks.translation import Translation

lengths_of_samples = st.integers(1, 2).flatmap(
    lambda sides: st.tuples(
        st.just(sides), st.lists(st.lists(st.integers(1, 40), min_size=sides, max_size=sides), max_size=80)
    )
)


@settings(max_examples=200)
@given(drawn=lengths_of_samples, row=st.integers(40, 100))
def test_every_sample_is_in_one_row_that_holds_it(drawn: tuple[int, list[list[int]]], row: int) -> None:
    sides, lengths = drawn
    samples = np.asarray(lengths, np.int64).reshape(-1, sides)
    rows = pack(samples, (row,) * sides)
    assert sorted(index for one in rows for index in one) == list(range(len(samples)))
    assert all((samples[one].sum(axis=0) <= row).all() and one for one in rows)
    assert rows == pack(samples, (row,) * sides)


def fill_of(data: StreamData, task: CausalLM | Translation, steps: int) -> tuple[float, set[tuple[int, ...]]]:
    """Share of positions that are no padding, and the shapes of the batches."""
    loader = loader_of(data, task, global_size=48)
    iterator = iter(loader)
    dealt = [next(iterator) for _ in range(steps)]
    loader.close()
    shapes = {tuple(tensor.shape) for step in dealt for batch in step.micro_batches for tensor in batch.values()}
    return 1 - sum(step.num_padding for step in dealt) / sum(step.num_positions for step in dealt), shapes


def test_rows_of_language_model_text_are_97_per_cent_full() -> None:
    data = StreamData("corpora:python_docs", batching="packed")
    texts = [record["text"] for _, record in data.datasets[""].records("train")]
    tokenizer = TrainedTokenizer(vocab_size=1000).prepare(lambda: iter(texts[:500]))
    fill, shapes = fill_of(data, CausalLM(tokenizer, "text", 1024), steps=40)
    assert fill >= 0.97 and shapes == {(48, 1024)}


def test_rows_of_sentence_pairs_are_92_per_cent_full() -> None:
    data = StreamData("corpora:homeassistant_en_de", batching="packed")
    records = [record for _, record in data.datasets[""].records("train")]
    tokenizer = TrainedTokenizer(vocab_size=2000).prepare(lambda: (r[side] for r in records for side in ("en", "de")))
    fill, shapes = fill_of(data, Translation(tokenizer, "en", "de"), steps=20)
    assert fill >= 0.92 and len(shapes) == 2  # one of each side


def test_a_record_longer_than_a_row_goes_on_in_the_next() -> None:
    data = memory_data(MemorySource([40] * 24), lanes=24, block=20, batching="packed")
    (steps,) = steps_of(data, None, task=LengthTask(max_length=10), epochs=1)
    ids = [id for step in steps for id in step.ids]
    assert "s0:1" in ids and "s0:1#1" in ids  # 14 long
    total = sum(1 + (7 * shard + 13 * number) % 23 for shard in range(24) for number in range(40))
    assert sum(step.num_target_tokens for step in steps) == total


@pytest.mark.parametrize("row_length", [5, [40, 40]])
def test_a_row_that_cannot_hold_the_longest_sample_is_refused(row_length: int | list[int]) -> None:
    data = memory_data(MemorySource([40] * 24), batching="packed", row_length=row_length)
    with pytest.raises(ConfigError, match=r"data.row_length=.* of at least 23"):
        loader_of(data, LengthTask(max_length=23))
