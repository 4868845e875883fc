from __future__ import annotations

from typing import Any

import pytest

from trainer.errors import ConfigError
from trainer.tasks import IGNORE, BadRecord, Encoded, GeneratesText, ScoresText
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
