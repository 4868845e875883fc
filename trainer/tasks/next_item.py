"""Next-item recommendation: what somebody takes next, from what they took before, by a decoder over item numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.data.sources import column
from trainer.errors import ConfigError
from trainer.tasks import AS_SET, IGNORE, AllFinished, BadRecord, Batch, Decoding, Encoded, LossSums, Record
from trainer.tasks.loss import token_loss
from trainer.tasks.text import next_token_batch, num_unmasked, pad_rows

_RANKED_ELEMENTS = 2**25
"""Scores that are ranked at once, in fp32: 128 MiB."""


class NextItem:
    """Cross-entropy over all items, at each position given the items before it (SASRec, Kang & McAuley 2018; its full
    softmax after Klenitskiy & Vasilev 2023).

    `items_column` holds a person's items, oldest first: numbers from 0 to `num_items` - 1, or names that stand in the
    file `vocabulary`, one a line, in the order of their numbers. `held_out_column` (None: there is none) tells how many
    of the last are to be predicted, all others being given; 0 means all but the first, as in training. Held-out
    records keep the latest `sequence_length` items before the last; others go on in further samples.

    Evaluation ranks the target among *all* items, for samples of them mislead (Krichene & Rendle 2020): recall@k is the
    share of targets among the first k, NDCG@k the mean of 1 / log2(1 + rank) where rank <= k, else 0. Items before the
    first target are left out of the ranking if `exclude_seen`. A tie counts as its middle rank.
    """

    def __init__(
        self,
        num_items: int,
        items_column: str = "items",
        held_out_column: str | None = "held_out",
        vocabulary: str | None = None,
        sequence_length: int = 50,
        exclude_seen: bool = True,
        top_k: int = 10,
        label_smoothing: float = 0.0,
        tokenizer: Any = None,
    ) -> None:
        """top_k: the k of the metrics, and how many items `generate` names; `tokenizer` is not used.

        Raises ConfigError for options that cannot be.
        """
        limits = {"num_items": (num_items, 2), "sequence_length": (sequence_length, 1), "top_k": (top_k, 1)}
        problems = [
            f"task.{key}={value} must be at least {low}." for key, (value, low) in limits.items() if value < low
        ]
        if problems:
            raise ConfigError(*problems)
        self.required_columns = tuple(name for name in (items_column, held_out_column) if name is not None)
        self.max_length: int | None = sequence_length
        self._num_items = num_items
        self._items_column = items_column
        self._held_out_column = held_out_column
        self._names = _read_vocabulary(vocabulary, num_items)
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._sequence_length = sequence_length
        self._exclude_seen = exclude_seen
        self._top_k = top_k
        self._label_smoothing = label_smoothing

    def encode(self, records: Sequence[Record]) -> list[Encoded | BadRecord]:
        """`ids` int32: the items but the last; `labels` int64: the next of each, IGNORE where it is given.

        `seen` int64: 0, and plus 1 the distinct items before the first target.
        """
        return [self._encode_one(record) for record in records]

    def _encode_one(self, record: Record) -> Encoded | BadRecord:
        try:
            values = [column(record, path) for path in self.required_columns]
        except KeyError as error:
            return BadRecord(f"column '{error.args[0]}' is missing")
        items = self._item_numbers(values[0], f"column '{self._items_column}'")
        if isinstance(items, BadRecord):
            return items
        held_out = values[1] if len(values) == 2 else 0
        if isinstance(held_out, bool) or not isinstance(held_out, int) or held_out < 0:
            return BadRecord(f"column '{self._held_out_column}' holds {held_out!r}, not a number of items")
        if len(items) < 2 or held_out >= len(items):
            return BadRecord(f"column '{self._items_column}' holds {len(items)} items, of which none is left to go by")
        first = len(items) - held_out if held_out else 1
        labels = np.where(np.arange(1, len(items)) < first, IGNORE, items[1:].astype(np.int64))
        if held_out:
            kept = min(len(labels), max(self._sequence_length, held_out))
            return _sample(items[-kept - 1 : -1], labels[-kept:], items[:first])
        return _sample(items[:-1], labels, items[:1])

    def _item_numbers(self, values: Any, where: str) -> npt.NDArray[np.int32] | BadRecord:
        if not isinstance(values, list | np.ndarray):
            return BadRecord(f"{where} holds {type(values).__name__}, not a list of items")
        numbers = []
        for value in values:
            if isinstance(value, str) and self._numbers:
                if value not in self._numbers:
                    return BadRecord(f"{where} holds {value!r}, which is not in task.vocabulary")
                numbers.append(self._numbers[value])
            elif isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < self._num_items:
                return BadRecord(f"{where} holds {value!r}, not a number from 0 to {self._num_items - 1}")
            else:
                numbers.append(int(value))
        return np.asarray(numbers, np.int32)

    def pieces(self, sample: Encoded) -> list[Encoded]:
        """Samples of at most `sequence_length` positions that predict each item once."""
        ids, labels = sample.fields["ids"], sample.fields["labels"]
        step = self._sequence_length
        starts = range(0, len(ids), step)
        return [
            _sample(ids[start : start + step], labels[start : start + step], sample.fields["seen"][1:] - 1)
            for start in starts
        ]

    def collate(self, samples: Sequence[Encoded]) -> Batch:
        """`input_ids` [B,T] int64, `attention_mask` [B,T] bool, `labels` [B,T] int64, `seen` [B,S] int64 (0: none)."""
        fields = [sample.fields for sample in samples]
        batch = next_token_batch([one["ids"] for one in fields], [one["labels"] for one in fields], pad_id=0)
        batch["seen"] = torch.from_numpy(pad_rows([one["seen"] for one in fields], 0))
        return batch

    def loss(self, model: Any, batch: Batch) -> LossSums:
        """Cross-entropy summed over the targets."""
        return token_loss(model, batch, self._label_smoothing)

    def batch_scores(self, model: Any, batch: Batch) -> dict[str, tuple[float, float]]:
        """See `ScoresBatches`: ndcg@k and recall@k."""
        logits = model(batch)
        gains = recalled = count = 0.0
        for rows, columns in _blocks(batch["labels"], logits.shape[-1]):
            scores, targets = logits[rows, columns].float(), batch["labels"][rows, columns]
            ranks = self._ranks(scores, targets, batch["seen"][rows])
            hits = ranks <= self._top_k
            gains += float((hits / torch.log2(1 + ranks)).sum())
            recalled += float(hits.sum())
            count += len(targets)
        return {f"ndcg@{self._top_k}": (gains, count), f"recall@{self._top_k}": (recalled, count)}

    def _ranks(self, scores: torch.Tensor, targets: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """[N] fp32 from 1: the place of each target [N] by its scores [N,V]; seen [N,S]: as in the batch."""
        own = scores.gather(1, targets[:, None])
        above, equal = (scores > own).sum(dim=1), (scores == own).sum(dim=1) - 1
        if self._exclude_seen:
            others = (seen > 0) & (seen - 1 != targets[:, None])
            found = scores.gather(1, (seen - 1).clamp(min=0))
            above -= ((found > own) & others).sum(dim=1)
            equal -= ((found == own) & others).sum(dim=1)
        return 1 + above + equal / 2

    def num_positions(self, batch: Batch) -> tuple[int, int]:
        """Positions of the rectangle, and how many of them are padding."""
        total = batch["labels"].numel()
        return total, total - num_unmasked(batch)

    def flops_per_sample_lengths(self, batch: Batch) -> dict[str, int]:
        """The side of the rectangle."""
        return {"target_length": batch["labels"].shape[1]}

    def headline(self) -> tuple[str, str]:
        """NDCG, to be maximised."""
        return f"eval/ndcg@{self._top_k}", "max"

    def target_bytes(self, record: Record, sample: Encoded) -> int:
        """Items are no text."""
        return 0

    def encode_prompts(self, texts: Sequence[str]) -> list[Encoded | BadRecord]:
        """Items, oldest first: names of the vocabulary parted by " | ", or numbers parted by blanks."""
        return [self._encode_prompt(text) for text in texts]

    def _encode_prompt(self, text: str) -> Encoded | BadRecord:
        if self._names:
            words: list[Any] = [word.strip() for word in text.split("|")]
        else:
            words = [int(word) if word.isdecimal() else word for word in text.split()]
        items = self._item_numbers(words, "the text")
        if isinstance(items, BadRecord):
            return items
        kept = items[-self._sequence_length :]
        return _sample(kept, np.full(len(kept), IGNORE), items)

    def generate(
        self,
        model: Any,
        samples: Sequence[Encoded],
        all_finished: AllFinished | None = None,
        how: Decoding = AS_SET,
    ) -> list[str]:
        """The `top_k` (or `how.max_length`) likeliest next items of each sample, as prompts are written."""
        device = next(model.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in self.collate(samples).items()}
        last = torch.tensor([sample.length - 1 for sample in samples], device=device)
        scores = model(batch)[torch.arange(len(samples), device=device), last, : self._num_items].float()
        if self._exclude_seen:
            hidden = torch.zeros(len(samples), self._num_items + 1, dtype=torch.bool, device=device)
            scores = scores.masked_fill(hidden.scatter_(1, batch["seen"], True)[:, 1:], -torch.inf)
        best = scores.topk(min(how.max_length or self._top_k, self._num_items), dim=1).indices.tolist()
        return [(" | " if self._names else " ").join(map(self._name, row)) for row in best]

    def _name(self, number: int) -> str:
        return self._names[number] if number < len(self._names) else str(number)


def _sample(ids: npt.NDArray[np.int32], labels: npt.NDArray[np.int64], seen: npt.NDArray[Any]) -> Encoded:
    fields: dict[str, npt.NDArray[Any]] = {
        "ids": ids,
        "labels": labels,
        "seen": np.concatenate([[0], np.unique(seen) + 1]),
    }
    return Encoded(fields, len(ids), int(np.count_nonzero(labels != IGNORE)))


def _blocks(labels: torch.Tensor, num_scores: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Row and column of every target in labels [B,T], so many at once as `_RANKED_ELEMENTS` allows."""
    rows, columns = (labels != IGNORE).nonzero(as_tuple=True)
    step = max(1, _RANKED_ELEMENTS // num_scores)
    for start in range(0, len(rows), step):
        yield rows[start : start + step], columns[start : start + step]


def _read_vocabulary(path: str | None, num_items: int) -> list[str]:
    """The names in a file, one a line. Raises ConfigError."""
    if path is None:
        return []
    try:
        names = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"task.vocabulary={path} cannot be read: {error}.") from error
    if len(names) > num_items:
        raise ConfigError(
            f"task.vocabulary={path} names {len(names)} items, task.num_items={num_items} is fewer;"
            f" set task.num_items={len(names)} or more."
        )
    return names
