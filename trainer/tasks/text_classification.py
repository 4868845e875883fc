"""Text classification: a text, or a pair of texts, in, one of `num_classes` labels out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trainer.data.sources import column
from trainer.errors import ConfigError
from trainer.tasks import BadRecord, Batch, Encoded, LossSums, Record
from trainer.tasks.classification import check_class_names
from trainer.tasks.loss import token_loss
from trainer.tasks.text import TextTokenizer, check_overlong, number_segments, pack_rows, text_at


class TextClassification:
    """One label per record; every record is one target "token". Evaluated by loss and accuracy.

    A sample is begin token + text + end token; with `second_column` (a question to a text, a hypothesis to a premise)
    the second text and another end token follow, as token type 1. label_column: integers in [0, num_classes), or names
    in `class_names`, whose order numbers them. max_length: tokens of a sample; a longer record is skipped, or cut with
    overlong="truncate", the longer of two texts first.
    """

    objective = "text_classification"

    def __init__(
        self,
        tokenizer: TextTokenizer,
        text_column: str,
        label_column: str,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        second_column: str | None = None,
        max_length: int = 128,
        overlong: str = "truncate",
        label_smoothing: float = 0.0,
    ) -> None:
        """Raises ConfigError for options that cannot be."""
        check_overlong(overlong)
        if num_classes < 2:
            raise ConfigError(f"task.num_classes={num_classes}: a classifier needs at least 2 classes.")
        check_class_names(class_names, num_classes)
        if max_length < 5:
            raise ConfigError(f"task.max_length={max_length}: two texts and their ends take at least 5 tokens.")
        if not 0.0 <= label_smoothing < 1.0:
            raise ConfigError(f"task.label_smoothing={label_smoothing}: use a number from 0 to below 1.")
        self._text_columns = (text_column,) if second_column is None else (text_column, second_column)
        self.required_columns = (*self._text_columns, label_column)
        self.max_length = max_length
        self.class_names = class_names
        self._tokenizer = tokenizer
        self._label_column = label_column
        self._num_classes = num_classes
        self._numbers = None if class_names is None else {name: index for index, name in enumerate(class_names)}
        self._overlong = overlong
        self._label_smoothing = label_smoothing

    def encode(self, records: Sequence[Record]) -> list[Encoded | BadRecord]:
        """`ids` int32: begin token, text, end token; `second_ids` int32, where there are two: text, end token; `label`
        int64 [1]."""
        sides = [self._encode_texts([text_at(record, path) for record in records]) for path in self._text_columns]
        texts = zip(*sides, strict=True)
        return [self._join(one, self._label_of(record)) for one, record in zip(texts, records, strict=True)]

    def _encode_texts(self, texts: Sequence[str | BadRecord]) -> list[list[int] | BadRecord]:
        ids = iter(self._tokenizer.encode_batch([text for text in texts if isinstance(text, str)]))
        return [text if isinstance(text, BadRecord) else next(ids) for text in texts]

    def _label_of(self, record: Record) -> int | BadRecord:
        try:
            label = column(record, self._label_column)
        except KeyError:
            return BadRecord(f"column '{self._label_column}' is missing")
        if self._numbers is not None:
            if isinstance(label, str) and label in self._numbers:
                return self._numbers[label]
            return BadRecord(f"column '{self._label_column}' holds {label!r}, which is not in task.class_names")
        if isinstance(label, bool) or not isinstance(label, int | np.integer) or not 0 <= label < self._num_classes:
            return BadRecord(
                f"column '{self._label_column}' holds {label!r}, not an integer from 0 to {self._num_classes - 1}"
            )
        return int(label)

    def _join(self, texts: Sequence[list[int] | BadRecord], label: int | BadRecord) -> Encoded | BadRecord:
        ids = [text for text in texts if not isinstance(text, BadRecord)]
        if len(ids) < len(texts) or isinstance(label, BadRecord):
            return next(one for one in (*texts, label) if isinstance(one, BadRecord))
        length = sum(map(len, ids)) + 1 + len(ids)
        if length > self.max_length and self._overlong == "skip":
            return BadRecord(f"{length} tokens are more than task.max_length={self.max_length} (task.overlong=skip)")
        first, *rest = _shortened(ids, self.max_length - 1 - len(ids))
        eos_id = self._tokenizer.eos_id
        fields = {"ids": np.asarray([self._tokenizer.bos_id, *first, eos_id], np.int32)}
        for second in rest:
            fields["second_ids"] = np.asarray([*second, eos_id], np.int32)
        fields["label"] = np.asarray([label], np.int64)
        return Encoded(fields, length=min(length, self.max_length), num_target_tokens=1)

    def pieces(self, sample: Encoded) -> list[Encoded]:
        """Always one: half a text has no label."""
        return [sample]

    def collate(self, samples: Sequence[Encoded]) -> Batch:
        """`input_ids` [B,T] int64, `attention_mask` [B,T] bool, `labels` [B] int64; of pairs `token_type_ids` [B,T]
        int64."""
        texts = [[sample.fields[name] for name in ("ids", "second_ids") if name in sample.fields] for sample in samples]
        lengths = [list(map(len, parts)) for parts in texts]
        longest = max(map(sum, lengths))
        segments, _ = number_segments(lengths, longest)
        batch = {
            "input_ids": torch.from_numpy(pack_rows(texts, longest, self._tokenizer.pad_id)),
            "attention_mask": torch.from_numpy(segments > 0),
            "labels": torch.from_numpy(np.concatenate([sample.fields["label"] for sample in samples])),
        }
        if len(self._text_columns) > 1:
            batch["token_type_ids"] = torch.from_numpy((segments == 2).astype(np.int64))
        return batch

    def loss(self, model: Any, batch: Batch) -> LossSums:
        """Cross-entropy summed over the samples."""
        return token_loss(model, batch, self._label_smoothing)

    def num_positions(self, batch: Batch) -> tuple[int, int]:
        """Positions of the rectangle, and how many of them are padding."""
        mask = batch["attention_mask"].numpy()
        return mask.size, mask.size - int(np.count_nonzero(mask))

    def flops_per_sample_lengths(self, batch: Batch) -> dict[str, int]:
        """The side of the rectangle."""
        return {"source_length": batch["input_ids"].shape[1]}

    def headline(self) -> tuple[str, str]:
        """Accuracy, to be maximised."""
        return "eval/accuracy", "max"

    def target_bytes(self, record: Record, sample: Encoded) -> int:
        """A class is no text."""
        return 0


def _shortened(texts: Sequence[list[int]], room: int) -> list[list[int]]:
    """The beginnings of one or two texts that fit `room` tokens; one of two that takes less than half stays whole."""
    if len(texts) == 1:
        return [texts[0][:room]]
    first, second = texts
    for_first = min(len(first), max(room - len(second), (room + 1) // 2))
    return [first[:for_first], second[: room - for_first]]
