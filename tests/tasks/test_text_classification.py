from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.errors import ConfigError
from trainer.models.encoder import Encoder
from trainer.tasks import BadRecord, Encoded
from trainer.tasks.text_classification import TextClassification


def make(tokenizer: Any, **options: Any) -> TextClassification:
    return TextClassification(tokenizer, "text", "label", **{"num_classes": 3, "max_length": 8, **options})


def encoded(task: TextClassification, *records: dict[str, Any]) -> list[Encoded]:
    samples = task.encode(list(records))
    assert all(isinstance(sample, Encoded) for sample in samples), samples
    return samples  # type: ignore[return-value]


def test_a_text_stands_between_begin_and_end(tokenizer: Any) -> None:
    task = make(tokenizer)
    batch = task.collate(encoded(task, {"text": "abc", "label": 2}, {"text": "a", "label": 0}))
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 100, 101, 102, 2], [1, 100, 2, 0, 0]],
        "attention_mask": [[True] * 5, [True] * 3 + [False] * 2],
        "labels": [2, 0],
    }
    assert task.num_positions(batch) == (10, 2)
    assert task.flops_per_sample_lengths(batch) == {"source_length": 5}
    assert task.headline() == ("eval/accuracy", "max")


def test_a_second_text_follows_as_another_type(tokenizer: Any) -> None:
    task = make(tokenizer, second_column="other")
    records = {"text": "ab", "other": "c", "label": 1}, {"text": "a", "other": "bcd", "label": 0}
    batch = task.collate(encoded(task, *records))
    assert batch["input_ids"].tolist() == [[1, 100, 101, 2, 102, 2, 0], [1, 100, 2, 101, 102, 103, 2]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]]
    assert task.required_columns == ("text", "other", "label")


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [("abcdefgh", "x", ("abcd", "x")), ("a", "xyzuvw", ("a", "xyzu")), ("abcdef", "xyzuvw", ("abc", "xy"))],
)
def test_the_longer_of_two_texts_is_cut_first(tokenizer: Any, first: str, second: str, kept: tuple[str, str]) -> None:
    task = make(tokenizer, second_column="other")
    (sample,) = encoded(task, {"text": first, "other": second, "label": 0})
    ends = [1, 2], [2]
    found = [tokenizer.decode([id for id in sample.fields[name] if id > 2]) for name in ("ids", "second_ids")]
    assert tuple(found) == kept
    assert sample.length == 8 == len(sample.fields["ids"]) + len(sample.fields["second_ids"])
    assert sample.fields["ids"][[0, -1]].tolist() == ends[0] and sample.fields["second_ids"][-1] == ends[1][0]


def test_classes_have_numbers_or_names(tokenizer: Any) -> None:
    named = make(tokenizer, class_names=["libs", "games", "doc"])
    labels = named.collate(encoded(named, {"text": "a", "label": "games"}, {"text": "a", "label": "libs"}))["labels"]
    assert labels.tolist() == [1, 0]
    assert named.encode([{"text": "a", "label": "tex"}]) == [
        BadRecord("column 'label' holds 'tex', which is not in task.class_names")
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "a", "label": 3}, "column 'label' holds 3, not an integer from 0 to 2"),
        ({"text": "a", "label": True}, "column 'label' holds True, not an integer from 0 to 2"),
        ({"text": "a"}, "column 'label' is missing"),
        ({"text": " ", "label": 0}, "column 'text' is empty"),
        ({"text": "abcdefghij", "label": 0}, "12 tokens are more than task.max_length=8 (task.overlong=skip)"),
    ],
)
def test_records_that_cannot_be_used(tokenizer: Any, record: dict[str, Any], reason: str) -> None:
    assert make(tokenizer, overlong="skip").encode([record]) == [BadRecord(reason)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, r"task\.num_classes=1"),
        ({"class_names": ["a", "b"]}, r"task\.class_names has 2 different names, task\.num_classes=3"),
        ({"class_names": ["a", "b", "b"]}, r"task\.class_names has 2 different names"),
        ({"max_length": 4}, r"task\.max_length=4"),
        ({"overlong": "split"}, r"task\.overlong=split"),
        ({"label_smoothing": 1.0}, r"task\.label_smoothing=1.0"),
    ],
)
def test_options_that_cannot_be(tokenizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tokenizer, **options)


def test_an_encoder_learns_which_letter_a_text_has(tokenizer: Any) -> None:
    task = make(tokenizer)
    texts = ["xxax", "axx", "xxb", "bxxx", "xcxx", "xxxc"]
    records = [{"text": text, "label": "abc".index(text.strip("x"))} for text in texts]
    batch = task.collate(encoded(task, *records))
    model = Encoder(
        259,
        32,
        4,
        64,
        2,
        dropout=0.0,
        attention_dropout=0.0,
        init_std=0.1,
        head="classification",
        num_classes=3,
        max_positions=8,
    )
    model.reset_parameters(torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        sums = task.loss(model, batch)
        optimizer.zero_grad()
        sums.objective.backward()
        optimizer.step()
    assert float(sums.nll) / 6 < 0.1
    assert int(task.loss(model.eval(), batch).num_correct) == 6
