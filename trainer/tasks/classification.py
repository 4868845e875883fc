"""Classification: numbers in, one of `num_classes` labels out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trainer.data.sources import column
from trainer.errors import ConfigError
from trainer.tasks import BadRecord, Batch, Encoded, LossSums, Record
from trainer.tasks.loss import token_loss


class Classification:
    """One label per record; every record is one target "token".

    input_column: numbers, flat or nested (a pixel list, a feature vector, an image); label_column: integers in
    [0, num_classes); input_shape: what `inputs` is reshaped to, e.g. [1, 28, 28] (None: as it comes, and then equal in
    all records); input_scale: factor on every number, e.g. 0.00392157 for bytes to [0, 1].
    """

    def __init__(
        self,
        input_column: str,
        label_column: str,
        num_classes: int,
        input_shape: Sequence[int] | None = None,
        input_scale: float = 1.0,
        label_smoothing: float = 0.0,
        tokenizer: Any = None,
    ) -> None:
        """`tokenizer` is not used. Raises ConfigError for fewer than two classes or a shape that is not positive."""
        if num_classes < 2:
            raise ConfigError(f"task.num_classes={num_classes}: a classifier needs at least 2 classes.")
        if input_shape is not None and any(size < 1 for size in input_shape):
            raise ConfigError(f"task.input_shape={list(input_shape)}: every size must be at least 1.")
        self.required_columns = (input_column, label_column)
        self.max_length = None
        self._input_column = input_column
        self._label_column = label_column
        self._num_classes = num_classes
        self._input_shape = None if input_shape is None else tuple(input_shape)
        self._input_scale = input_scale
        self._label_smoothing = label_smoothing

    def encode(self, records: Sequence[Record]) -> list[Encoded | BadRecord]:
        """`inputs` float32 of `input_shape`, `label` int64 [1]."""
        return [self._encode_one(record) for record in records]

    def _encode_one(self, record: Record) -> Encoded | BadRecord:
        values = []
        for path in self.required_columns:
            try:
                values.append(column(record, path))
            except KeyError:
                return BadRecord(f"column '{path}' is missing")
        value, label = values
        if isinstance(label, bool) or not isinstance(label, int | np.integer) or not 0 <= label < self._num_classes:
            return BadRecord(
                f"column '{self._label_column}' holds {label!r}, not an integer from 0 to {self._num_classes - 1}"
            )
        inputs = self._read(value)
        if isinstance(inputs, BadRecord):
            return BadRecord(f"column '{self._input_column}' {inputs.reason}")
        fields = {"inputs": inputs, "label": np.asarray([label], dtype=np.int64)}
        return Encoded(fields, length=1, num_target_tokens=1)

    def _read(self, value: Any) -> np.ndarray[Any, Any] | BadRecord:
        """The input that a column holds, or what is wrong with it ("holds ...")."""
        try:
            inputs = np.asarray(value, dtype=np.float32)
        except (TypeError, ValueError):
            return BadRecord(f"holds {type(value).__name__}, not numbers")
        if self._input_shape is not None:
            if inputs.size != math.prod(self._input_shape):
                return BadRecord(
                    f"holds {inputs.size} numbers, not the {math.prod(self._input_shape)} of"
                    f" task.input_shape={list(self._input_shape)}"
                )
            inputs = inputs.reshape(self._input_shape)
        if not np.isfinite(inputs).all():
            return BadRecord("holds a number that is not finite")
        return inputs * np.float32(self._input_scale)

    def pieces(self, sample: Encoded) -> list[Encoded]:
        """Always one."""
        return [sample]

    def collate(self, samples: Sequence[Encoded]) -> Batch:
        """`inputs` [B, *input_shape] float32, `labels` [B] int64."""
        return {
            "inputs": torch.from_numpy(np.stack([sample.fields["inputs"] for sample in samples])),
            "labels": torch.from_numpy(np.concatenate([sample.fields["label"] for sample in samples])),
        }

    def loss(self, model: Any, batch: Batch) -> LossSums:
        """Cross-entropy summed over the samples."""
        return token_loss(model, batch, self._label_smoothing)

    def num_positions(self, batch: Batch) -> tuple[int, int]:
        """One position a sample; nothing is padded."""
        return batch["labels"].numel(), 0

    def flops_per_sample_lengths(self, batch: Batch) -> dict[str, int]:
        """None: a classifier's inputs all have the same size."""
        return {}

    def headline(self) -> tuple[str, str]:
        """Accuracy, to be maximised."""
        return "eval/accuracy", "max"

    def target_bytes(self, record: Record, sample: Encoded) -> int:
        """A class is no text."""
        return 0


def check_class_names(class_names: Sequence[str] | None, num_classes: int) -> None:
    """Raises ConfigError for names that are not as many as the classes."""
    if class_names is not None and (len(class_names) != num_classes or len(set(class_names)) < num_classes):
        raise ConfigError(
            f"task.class_names has {len(set(class_names))} different names,"
            f" task.num_classes={num_classes}; there must be as many."
        )
