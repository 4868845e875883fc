"""Next-item recommendation: what is predicted, and ranks worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.errors import ConfigError
from trainer.loop import blank_of
from trainer.tasks import IGNORE, BadRecord, Encoded, GeneratesText, PacksRows, ScoresBatches
from trainer.tasks.next_item import NextItem


def encoded(task: NextItem, *records: dict[str, Any]) -> list[Encoded]:
    samples = task.encode(records)
    assert all(isinstance(sample, Encoded) for sample in samples), samples
    return samples  # type: ignore[return-value]


def test_each_item_is_predicted_from_those_before_it() -> None:
    task = NextItem(10, sequence_length=4)
    train, held = encoded(task, {"items": [3, 1, 2], "held_out": 0}, {"items": [3, 1, 2, 5], "held_out": 1})
    batch = task.collate([train, held])
    assert batch["input_ids"].tolist() == [[3, 1, 0], [3, 1, 2]]
    assert batch["labels"].tolist() == [[1, 2, IGNORE], [IGNORE, IGNORE, 5]]
    assert batch["seen"].tolist() == [[0, 4, 0, 0], [0, 2, 3, 4]]
    assert (train.num_target_tokens, held.num_target_tokens) == (2, 1)
    assert task.num_positions(batch) == (6, 1)
    assert not isinstance(task, PacksRows)


def test_long_histories_go_on_in_training_and_keep_the_latest_when_held_out() -> None:
    task = NextItem(10, sequence_length=2)
    train, held = encoded(task, {"items": [0, 1, 2, 3], "held_out": 0}, {"items": [0, 1, 2, 3], "held_out": 1})
    pieces = task.pieces(train)
    assert [(one.fields["ids"].tolist(), one.fields["labels"].tolist()) for one in pieces] == [
        ([0, 1], [1, 2]),
        ([2], [3]),
    ]
    (kept,) = task.pieces(held)
    assert (kept.fields["ids"].tolist(), kept.fields["labels"].tolist()) == ([1, 2], [IGNORE, 3])
    assert kept.fields["seen"].tolist() == [0, 1, 2, 3], "what is no longer read is still not offered"


@pytest.mark.parametrize(
    ("exclude_seen", "rank"),
    [(True, 2.5), (False, 4.5)],
)
def test_ranks_are_among_all_items_that_are_new(exclude_seen: bool, rank: float) -> None:
    """Scores 9 8 7 5 5 0 of the items 0 to 5; 0 and 1 are seen, 3 is the target, 2 is above it and 4 ties with it."""
    scores = torch.tensor([9.0, 8.0, 7.0, 5.0, 5.0, 0.0])
    for k, hit in ((1, False), (5, True)):
        task = NextItem(6, exclude_seen=exclude_seen, top_k=k)
        batch = task.collate(encoded(task, {"items": [0, 1, 0, 3], "held_out": 1}))
        found = task.batch_scores(lambda given: scores.expand(1, 3, 6), batch)
        gain = 1 / math.log2(1 + rank) if hit else 0.0
        assert found == {f"ndcg@{k}": (pytest.approx(gain), 1), f"recall@{k}": (float(hit), 1)}
    assert isinstance(task, ScoresBatches)
    blank = task.batch_scores(lambda given: scores.expand(1, 3, 6), blank_of(batch))
    assert set(blank.values()) == {(0.0, 0.0)}


def test_a_target_seen_before_is_not_taken_from_the_ranking() -> None:
    task = NextItem(3, top_k=1)
    batch = task.collate(encoded(task, {"items": [0, 1, 0], "held_out": 1}))
    assert task.batch_scores(lambda given: torch.tensor([2.0, 3.0, 1.0]).expand(1, 2, 3), batch)["recall@1"] == (1, 1)


def test_items_have_names(tmp_path: Path) -> None:
    (tmp_path / "items.txt").write_text("Alien\n1984\nBig\n")
    task = NextItem(4, vocabulary=str(tmp_path / "items.txt"), held_out_column=None, top_k=2)
    (sample,) = encoded(task, {"items": ["1984", "Big", "Alien"]})
    assert sample.fields["ids"].tolist() == [1, 2] and sample.fields["labels"].tolist() == [2, 0]
    (prompt,) = task.encode_prompts(["Big | 1984"])
    assert isinstance(prompt, Encoded) and isinstance(task, GeneratesText)
    model: Any = torch.nn.Linear(1, 1)
    model.forward = lambda batch: torch.tensor([1.0, 3.0, 4.0, 2.0]).expand(1, 2, 4)
    assert task.generate(model, [prompt]) == ["3 | Alien"], "what was seen is not offered"
    assert task.encode([{"items": ["Big", "Heat"]}]) == [
        BadRecord("column 'items' holds 'Heat', which is not in task.vocabulary")
    ]
    with pytest.raises(ConfigError, match=r"names 3 items, task\.num_items=2"):
        NextItem(2, vocabulary=str(tmp_path / "items.txt"))
    with pytest.raises(ConfigError, match="cannot be read"):
        NextItem(2, vocabulary=str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"items": [1, 2]}, "column 'held_out' is missing"),
        ({"items": "1 2", "held_out": 0}, "column 'items' holds str, not a list of items"),
        ({"items": [1, 9], "held_out": 0}, "column 'items' holds 9, not a number from 0 to 8"),
        ({"items": [1, 2], "held_out": -1}, "column 'held_out' holds -1, not a number of items"),
        ({"items": [1, 2], "held_out": 2}, "column 'items' holds 2 items, of which none is left to go by"),
        ({"items": [1], "held_out": 0}, "column 'items' holds 1 items, of which none is left to go by"),
    ],
)
def test_a_record_that_cannot_be_used_says_why(record: dict[str, Any], reason: str) -> None:
    assert NextItem(9).encode([record]) == [BadRecord(reason)]


def test_options_that_cannot_be_are_refused_together() -> None:
    with pytest.raises(ConfigError, match=r"task\.num_items=1 .*\ntask\.top_k=0"):
        NextItem(1, top_k=0)
