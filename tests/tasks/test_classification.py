from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from trainer.errors import ConfigError
from trainer.tasks import BadRecord, Encoded, GeneratesText, PacksRows
from trainer.tasks.classification import Classification


def encoded(task: Classification, *records: dict[str, Any]) -> list[Encoded]:
    samples = task.encode(records)
    assert all(isinstance(sample, Encoded) for sample in samples), samples
    return samples  # type: ignore[return-value]


def test_pixels_are_scaled_and_shaped() -> None:
    task = Classification("image", "digit", 10, input_shape=[1, 2, 2], input_scale=1 / 16)
    flat, nested = {"image": [0, 4, 8, 16], "digit": 3}, {"image": np.array([[16, 8], [4, 0]]), "digit": np.int64(9)}
    batch = task.collate(encoded(task, flat, nested))
    assert batch["inputs"].dtype == torch.float32
    assert batch["inputs"].tolist() == [[[[0, 0.25], [0.5, 1]]], [[[1, 0.5], [0.25, 0]]]]
    assert batch["labels"].tolist() == [3, 9]
    assert task.num_positions(batch) == (2, 0)


def test_loss_and_accuracy_count_samples() -> None:
    task = Classification("x", "y", 3)
    batch = task.collate(encoded(task, {"x": [1.0], "y": 0}, {"x": [2.0], "y": 2}))
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.5]])
    sums = task.loss(lambda given: logits, batch)
    assert (sums.num_target_tokens.item(), sums.num_correct.item()) == (2, 1)
    expected = -(logits.log_softmax(-1)[0, 0] + logits.log_softmax(-1)[1, 2])
    torch.testing.assert_close(sums.nll, expected)
    assert task.headline() == ("eval/accuracy", "max")
    assert not isinstance(task, GeneratesText)


def test_a_sample_is_its_only_piece_and_shares_no_row() -> None:
    task = Classification("x", "y", 3)
    (sample,) = encoded(task, {"x": [1.0], "y": 0})
    assert task.pieces(sample) == [sample]
    assert not isinstance(task, PacksRows)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"x": [1, 2]}, "column 'y' is missing"),
        ({"x": [1, 2], "y": 3}, "column 'y' holds 3, not an integer from 0 to 2"),
        ({"x": [1, 2], "y": True}, "column 'y' holds True, not an integer from 0 to 2"),
        ({"x": [1, 2], "y": "cat"}, "column 'y' holds 'cat', not an integer from 0 to 2"),
        ({"x": [1, 2, 3], "y": 0}, "column 'x' holds 3 numbers, not the 2 of task.input_shape=[2]"),
        ({"x": "ab", "y": 0}, "column 'x' holds str, not numbers"),
        ({"x": [1, float("nan")], "y": 0}, "column 'x' holds a number that is not finite"),
    ],
)
def test_a_record_that_cannot_be_used_says_why(bad: dict[str, Any], reason: str) -> None:
    assert Classification("x", "y", 3, input_shape=[2]).encode([bad]) == [BadRecord(reason)]


def test_options_that_cannot_be_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"task\.num_classes=1"):
        Classification("x", "y", 1)
    with pytest.raises(ConfigError, match=r"task\.input_shape"):
        Classification("x", "y", 2, input_shape=[0, 3])
