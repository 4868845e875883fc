from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.errors import ConfigError
from trainer.tasks import IGNORE, BadRecord, Encoded, PacksRows, ScoresText
from trainer.tasks.translation import Translation


@pytest.fixture
def task(tokenizer: Any) -> Translation:
    return Translation(tokenizer, "translation.en", "translation.de", max_source_length=6, max_target_length=4)


def record(source: object, target: object) -> dict[str, Any]:
    return {"translation": {"en": source, "de": target}}


def encoded(task: Translation, *records: dict[str, Any]) -> list[Encoded]:
    samples = task.encode(records)
    assert all(isinstance(sample, Encoded) for sample in samples), samples
    return samples  # type: ignore[return-value]


def test_both_sides_end_with_the_end_token(task: Translation) -> None:
    (sample,) = encoded(task, record("ab", "c"))
    assert sample.fields["source_ids"].tolist() == [100, 101, 2]
    assert sample.fields["target_ids"].tolist() == [102, 2]
    assert (sample.length, sample.num_target_tokens) == (3, 2)


def test_collate_shifts_the_target_and_marks_padding(task: Translation) -> None:
    batch = task.collate(encoded(task, record("ab", "c"), record("a", "cde")))
    assert batch["source_ids"].tolist() == [[100, 101, 2], [100, 2, 0]]
    assert batch["source_mask"].tolist() == [[True, True, True], [True, True, False]]
    assert batch["decoder_input_ids"].tolist() == [[1, 102, 0, 0], [1, 102, 103, 104]]
    assert batch["labels"].tolist() == [[102, 2, IGNORE, IGNORE], [102, 103, 104, 2]]
    assert task.num_positions(batch) == (6 + 8, 1 + 2)
    assert task.flops_per_sample_lengths(batch) == {"source_length": 3, "target_length": 4}


def test_targets_begin_with_the_start_token(tokenizer: Any) -> None:
    """As BART's and Marian's do, alone and in packed rows."""
    task = Translation(tokenizer, "translation.en", "translation.de", start_token="</s>")
    samples = encoded(task, record("ab", "c"), record("a", "c"))
    assert task.collate(samples)["decoder_input_ids"].tolist() == [[2, 102], [2, 102]]
    assert task.collate_rows([samples], (5, 4))["decoder_input_ids"].tolist() == [[2, 102, 2, 102]]


def test_rows_hold_samples_one_after_the_other_on_both_sides(task: Translation) -> None:
    assert isinstance(task, PacksRows)
    one, two, three = encoded(task, record("ab", "c"), record("a", "cde"), record("abc", "d"))
    assert [task.sides(sample) for sample in (one, two, three)] == [(3, 2), (2, 4), (4, 2)]
    batch = task.collate_rows([[one, two], [three]], (5, 7))
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "source_ids": [[100, 101, 2, 100, 2], [100, 101, 102, 2, 0]],
        "source_mask": [[True] * 5, [True] * 4 + [False]],
        "source_segment_ids": [[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]],
        "source_position_ids": [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]],
        "decoder_input_ids": [[1, 102, 1, 102, 103, 104, 0], [1, 103, 0, 0, 0, 0, 0]],
        "labels": [[102, 2, 102, 103, 104, 2, IGNORE], [103, 2] + [IGNORE] * 5],
        "target_segment_ids": [[1, 1, 2, 2, 2, 2, 0], [1, 1, 0, 0, 0, 0, 0]],
        "target_position_ids": [[0, 1, 0, 1, 2, 3, 0], [0, 1, 0, 0, 0, 0, 0]],
    }
    plain = task.collate([one])
    assert {name: batch[name].dtype for name in plain} == {name: tensor.dtype for name, tensor in plain.items()}
    assert task.num_positions(batch) == (10 + 14, 1 + 6)
    assert task.flops_per_sample_lengths(batch) == {"source_length": 5, "target_length": 7}


def test_a_sample_is_its_only_piece(task: Translation) -> None:
    (sample,) = encoded(task, record("ab", "c"))
    assert task.pieces(sample) == [sample]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"translation": {"en": "a"}}, "column 'translation.de' is missing"),
        (record("a", "  "), "column 'translation.de' is empty"),
        (record(None, "b"), "column 'translation.en' is empty"),
        (record(["a"], "b"), "column 'translation.en' holds list, not text"),
        (record("abcdef", "b"), "7 tokens are more than task.max_source_length=6 (task.overlong=skip)"),
        (record("a", "abcd"), "5 tokens are more than task.max_target_length=4 (task.overlong=skip)"),
    ],
)
def test_a_record_that_cannot_be_used_says_why_and_leaves_its_neighbours_alone(
    task: Translation, bad: dict[str, Any], reason: str
) -> None:
    before, result, after = task.encode([record("x", "y"), bad, record("z", "w")])
    assert result == BadRecord(reason)
    assert isinstance(before, Encoded) and before.fields["source_ids"].tolist() == [123, 2]
    assert isinstance(after, Encoded) and after.fields["target_ids"].tolist() == [122, 2]


def test_truncating_keeps_the_end_token_and_counts_the_bytes_kept(tokenizer: Any) -> None:
    task = Translation(tokenizer, "en", "de", max_source_length=3, max_target_length=3, overlong="truncate")
    long, short = {"en": "abcdef", "de": "uvwxyz"}, {"en": "a", "de": "ü"}
    cut, whole = encoded(task, long, short)
    assert cut.fields["source_ids"].tolist() == [100, 101, 2]
    assert cut.fields["target_ids"].tolist() == [120, 121, 2]
    assert task.target_bytes(long, cut) == 2
    assert task.target_bytes(short, whole) == 2


def test_the_loss_smooths_labels_but_reports_the_plain_likelihood(task: Translation) -> None:
    batch = task.collate(encoded(task, record("a", "b"), record("a", "cde")))
    logits = torch.randn(2, 4, 259, generator=torch.Generator().manual_seed(0))
    seen: list[Any] = []

    def model(given: Any) -> torch.Tensor:
        seen.append(given)
        return logits

    sums = task.loss(model, batch)
    assert seen == [batch]
    log_probs = logits.log_softmax(-1)
    targets = [(0, 0, 101), (0, 1, 2), (1, 0, 102), (1, 1, 103), (1, 2, 104), (1, 3, 2)]
    nll = -sum(log_probs[place] for place in targets)
    uniform = -sum(log_probs[row, position].mean() for row, position, _ in targets)
    torch.testing.assert_close(sums.nll, torch.as_tensor(nll))
    torch.testing.assert_close(sums.objective, torch.as_tensor(0.9 * nll + 0.1 * uniform))
    assert sums.num_target_tokens.item() == 6


def test_scores_are_sacrebleus_with_signature(task: Translation) -> None:
    references = ["the cat sat on the mat today", "we went home early in the evening"]
    sources = ["die Katze sass heute auf der Matte", "we went home early in the evening"]
    scores = task.score(references, references, sources)
    assert isinstance(task, ScoresText)
    assert scores["bleu"] == pytest.approx(100.0)
    assert scores["chrf"] == pytest.approx(100.0)
    assert 0.0 < float(scores["copy_bleu"]) < 100.0
    assert "tok:13a" in str(scores["bleu_signature"])


def test_chinese_is_tokenized_by_character_when_asked(tokenizer: Any) -> None:
    hypothesis, reference = ["我喜欢吃红苹果"], ["我喜欢吃绿苹果"]
    plain = Translation(tokenizer, "en", "zh").score(hypothesis, reference, [""])
    chinese = Translation(tokenizer, "en", "zh", bleu_tokenize="zh").score(hypothesis, reference, [""])
    assert float(chinese["bleu"]) > float(plain["bleu"])
    assert "tok:zh" in str(chinese["bleu_signature"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"overlong": "cut"}, "task.overlong=cut"),
        ({"overlong": "split"}, "task.overlong=split"),
        ({"label_smoothing": 1.5}, "task.label_smoothing=1.5"),
        ({"max_source_length": 1}, "task.max_source_length=1"),
        ({"bleu_tokenize": "13b"}, "task.bleu_tokenize=13b"),
        ({"start_token": "<de>"}, "task.start_token=<de> is no token"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(tokenizer: Any, option: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Translation(tokenizer, "en", "de", **option)


def test_longest_sample_is_known_before_any_data(task: Translation) -> None:
    assert task.max_length == 6
    longest = encoded(task, record("abcde", "abc"))[0]
    assert longest.length == 6
