from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.tasks import IGNORE, BadRecord, Encoded, GeneratesText, PacksRows, ScoresText
from trainer.tasks.causal_lm import CausalLM


@pytest.fixture
def task(tokenizer: Any) -> CausalLM:
    return CausalLM(tokenizer, "text", sequence_length=4)


def encoded(task: CausalLM, *texts: str) -> list[Encoded]:
    samples = task.encode([{"text": text} for text in texts])
    assert all(isinstance(sample, Encoded) for sample in samples), samples
    return samples  # type: ignore[return-value]


def test_every_token_and_the_end_is_predicted_from_those_before(task: CausalLM) -> None:
    batch = task.collate(encoded(task, "abc", "a"))
    assert batch["input_ids"].tolist() == [[1, 100, 101, 102], [1, 100, 0, 0]]
    assert batch["labels"].tolist() == [[100, 101, 102, 2], [100, 2, IGNORE, IGNORE]]
    assert batch["attention_mask"].tolist() == [[True] * 4, [True, True, False, False]]
    assert task.num_positions(batch) == (8, 2)
    assert task.flops_per_sample_lengths(batch) == {"target_length": 4}


def test_sizes_of_a_sample(task: CausalLM) -> None:
    (sample,) = encoded(task, "abc")
    assert (sample.length, sample.num_target_tokens, task.max_length) == (4, 4, 4)


def test_a_text_too_long_is_skipped_with_the_numbers_or_cut(task: CausalLM, tokenizer: Any) -> None:
    assert task.encode([{"text": "abcd"}]) == [
        BadRecord("5 tokens are more than task.sequence_length=4 (task.overlong=skip)")
    ]
    cutting = CausalLM(tokenizer, "text", sequence_length=4, overlong="truncate")
    (cut,) = encoded(cutting, "abcdef")
    assert cut.fields["ids"].tolist() == [1, 100, 101, 102, 2]
    assert cutting.target_bytes({"text": "abcdef"}, cut) == 3


def test_bytes_are_those_of_utf8(tokenizer: Any) -> None:
    task = CausalLM(tokenizer, "text", sequence_length=10)
    (sample,) = encoded(task, "ä€")
    assert task.target_bytes({"text": "ä€"}, sample) == 5


def test_prompts_begin_with_the_begin_token_and_have_no_end(task: CausalLM) -> None:
    prompt, empty, long = task.encode_prompts(["ab", "", "abcdef"])
    assert isinstance(prompt, Encoded) and prompt.fields["ids"].tolist() == [1, 100, 101]
    assert isinstance(empty, Encoded) and empty.fields["ids"].tolist() == [1]
    assert isinstance(long, BadRecord) and "7 tokens" in long.reason


def test_it_writes_text_but_has_no_references_to_score(task: CausalLM) -> None:
    assert isinstance(task, GeneratesText)
    assert not isinstance(task, ScoresText)


def test_sequence_length_must_leave_room_for_a_token_and_the_end(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"task\.sequence_length=1"):
        CausalLM(tokenizer, "text", sequence_length=1)


def test_rows_hold_samples_one_after_the_other(task: CausalLM) -> None:
    assert isinstance(task, PacksRows)
    one, two, three = encoded(task, "abc", "a", "bc")
    assert [task.sides(sample) for sample in (one, two, three)] == [(4,), (2,), (3,)]
    batch = task.collate_rows([[one, two], [three]], (7,))
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 100, 101, 102, 1, 100, 0], [1, 101, 102, 0, 0, 0, 0]],
        "attention_mask": [[True] * 6 + [False], [True] * 3 + [False] * 4],
        "labels": [[100, 101, 102, 2, 100, 2, IGNORE], [101, 102, 2] + [IGNORE] * 4],
        "segment_ids": [[1, 1, 1, 1, 2, 2, 0], [1, 1, 1, 0, 0, 0, 0]],
        "position_ids": [[0, 1, 2, 3, 0, 1, 0], [0, 1, 2, 0, 0, 0, 0]],
    }
    plain = task.collate([one])
    assert {name: batch[name].dtype for name in plain} == {name: tensor.dtype for name, tensor in plain.items()}
    assert task.num_positions(batch) == (14, 5)
    assert task.flops_per_sample_lengths(batch) == {"target_length": 7}


def test_samples_that_do_not_fit_their_row_are_no_batch(task: CausalLM) -> None:
    with pytest.raises(AssertionError, match="row of 5"):
        task.collate_rows([encoded(task, "abc", "a")], (5,))


def test_a_text_in_pieces_goes_on_where_it_was_cut(tokenizer: Any) -> None:
    task = CausalLM(tokenizer, "text", sequence_length=4, overlong="split")
    (sample,) = encoded(task, "abcdefgh")
    pieces = task.pieces(sample)
    assert [piece.fields["ids"].tolist() for piece in pieces] == [
        [1, 100, 101, 102, 103],
        [103, 104, 105, 106, 107],
        [107, 2],
    ]
    assert [(piece.length, piece.num_target_tokens) for piece in pieces] == [(4, 4), (4, 4), (1, 1)]
    assert [task.target_bytes({"text": "abcdefgh"}, piece) for piece in pieces] == [8, 0, 0]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(min_size=1).filter(str.strip), length=st.integers(2, 12))
def test_pieces_predict_every_token_once_and_count_every_byte_once(tokenizer: Any, text: str, length: int) -> None:
    task = CausalLM(tokenizer, "text", sequence_length=length, overlong="split")
    (sample,) = encoded(task, text)
    pieces = task.pieces(sample)
    labels = np.concatenate([piece.fields["ids"][1:] for piece in pieces])
    inputs = np.concatenate([piece.fields["ids"][:-1] for piece in pieces])
    assert labels.tolist() == tokenizer.encode_batch([text])[0] + [tokenizer.eos_id]
    assert inputs.tolist() == [tokenizer.bos_id, *labels[:-1].tolist()]
    assert all(1 <= piece.length <= length for piece in pieces)
    assert all(piece.length == piece.num_target_tokens == len(piece.fields["ids"]) - 1 for piece in pieces)
    assert sum(task.target_bytes({"text": text}, piece) for piece in pieces) == len(text.encode())
    assert [task.pieces(piece) for piece in pieces] == [[piece] for piece in pieces]


def test_a_sample_that_fits_is_its_only_piece(task: CausalLM) -> None:
    (sample,) = encoded(task, "abc")
    assert task.pieces(sample) == [sample]


def test_a_choice_for_long_texts_that_is_not_known_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"task\.overlong=cut .* skip, truncate, split"):
        CausalLM(tokenizer, "text", sequence_length=4, overlong="cut")
