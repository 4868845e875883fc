"""A task: a number for a number, by least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from trainer.tasks import IGNORE, BadRecord, Batch, Encoded, LossSums, Record


class Regression:
    """Column `x_column` to column `y_column`; a sample counts as right within `tolerance`."""

    objective = "regression"
    max_length = None

    def __init__(self, x_column: str, y_column: str, tolerance: float = 0.1, tokenizer: Any = None) -> None:
        self.required_columns = (x_column, y_column)
        self._tolerance = tolerance

    def encode(self, records: Sequence[Record]) -> list[Encoded | BadRecord]:
        """`x` and `y`, float32 [1]; a record without numbers is a bad one, with the reason."""
        return [self._encode_one(record) for record in records]

    def _encode_one(self, record: Record) -> Encoded | BadRecord:
        fields = {}
        for name, column in zip(("x", "y"), self.required_columns, strict=True):
            value = record[column]
            if not isinstance(value, int | float):
                return BadRecord(f"column '{column}' holds {value!r}, not a number")
            fields[name] = np.asarray([value], dtype=np.float32)
        return Encoded(fields, length=1, num_target_tokens=1)

    def pieces(self, sample: Encoded) -> list[Encoded]:
        """Always one."""
        return [sample]

    def collate(self, samples: Sequence[Encoded]) -> Batch:
        """`x`, `y` [B] float32; `labels` [B] say which samples count."""
        columns = {name: np.concatenate([sample.fields[name] for sample in samples]) for name in ("x", "y")}
        labels = torch.zeros(len(samples), dtype=torch.int64)
        return {**{name: torch.from_numpy(values) for name, values in columns.items()}, "labels": labels}

    def loss(self, model: Any, batch: Batch) -> LossSums:
        """Squared errors, summed over the samples that count."""
        counts = batch["labels"] != IGNORE
        errors = (model(batch).float() - batch["y"]) * counts
        objective = errors.square().sum()
        right = ((errors.abs() <= self._tolerance) & counts).sum()
        return LossSums(objective, objective.detach(), counts.sum(), right)

    def num_positions(self, batch: Batch) -> tuple[int, int]:
        """One position a sample; nothing is padded."""
        return batch["labels"].numel(), 0

    def flops_per_sample_lengths(self, batch: Batch) -> Mapping[str, int]:
        """None: every sample is of one size."""
        return {}

    def headline(self) -> tuple[str, str]:
        """The mean squared error."""
        return "eval/loss", "min"

    def target_bytes(self, record: Record, sample: Encoded) -> int:
        """A number is no text."""
        return 0
