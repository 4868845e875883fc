"""Tasks: what a record becomes, how samples make a batch, the loss of a batch, and what is measured.

One file per objective. A task is built by `_target_` with its options plus `tokenizer` (or None). The contract is
`Task` below, with `GeneratesText` and `ScoresText` for tasks that write text, `PacksRows` for those whose samples can
share a row, and `Augments` for those that change samples at random. Every batch has `labels`; `IGNORE` (-100) there
means "this position carries no loss". A batch whose labels are all IGNORE weighs nothing: that is how ranks that ran
out of data keep step with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import torch

IGNORE = -100

Record = Mapping[str, Any]
"""A row of the source, as read."""

Batch = dict[str, "torch.Tensor"]
"""Tensors of one micro-batch; first dimension = samples; `labels` always present."""

AllFinished = Callable[[bool], bool]
"""Whether every rank has finished decoding, given whether this one has; a collective where ranks must step together."""


class Encoded(NamedTuple):
    """A record made ready for batching.

    fields: arrays by name (token ids int32, inputs float32, pixels uint8); length: positions it takes in a batch (the
    key of length bucketing; for pairs the source and target lengths are compared in turn, so `length` is a tuple's
    maximum); num_target_tokens: positions that will carry loss.
    """

    fields: Mapping[str, np.ndarray[Any, Any]]
    length: int
    num_target_tokens: int


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record the task cannot use; `reason` names the column and what is wrong with it."""

    reason: str


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over the target tokens of one micro-batch, to be divided by the *global* number of target tokens.

    objective: scalar fp32 tensor with gradient, what training minimises (label smoothing and the like included);
    nll: scalar fp32 tensor without gradient, the plain negative log-likelihood in nats;
    num_target_tokens, num_correct: scalar int64 tensors.
    """

    objective: torch.Tensor
    nll: torch.Tensor
    num_target_tokens: torch.Tensor
    num_correct: torch.Tensor


class Task(Protocol):
    """See the module's docstring."""

    required_columns: Sequence[str]
    """Dotted column paths that every record must have; checked when a data set is opened."""

    max_length: int | None
    """Positions of the longest of the `pieces`; must not exceed the model's `max_positions`. None: any."""

    def encode(self, records: Sequence[Record]) -> list[Encoded | BadRecord]:
        """Encode many records at once (the tokenizer is batched); one result per record, in order.

        Called from several threads, so it keeps nothing between calls.
        """

    def pieces(self, sample: Encoded) -> list[Encoded]:
        """What goes into batches for `sample`: itself, or the parts of one longer than `max_length`, in order."""

    def collate(self, samples: Sequence[Encoded]) -> Batch:
        """Pad `samples` (at least one) to a common length."""

    def loss(self, model: Any, batch: Batch) -> LossSums:
        """Run `model(batch)` and sum the loss over the target tokens."""

    def num_positions(self, batch: Batch) -> tuple[int, int]:
        """(all positions, padding positions) of a batch, source and target together."""

    def flops_per_sample_lengths(self, batch: Batch) -> dict[str, int]:
        """The padded lengths that `model.flops_per_sample` takes (source_length, target_length), or {} if none."""

    def headline(self) -> tuple[str, str]:
        """The metric by which checkpoints are compared and its direction: ("eval/loss", "min")."""

    def target_bytes(self, record: Record, sample: Encoded) -> int:
        """UTF-8 bytes of the text that the target tokens of `sample` spell (for bits per byte); 0 if none.

        Of several `pieces` the first counts for all.
        """


@runtime_checkable
class PacksRows(Protocol):
    """A task whose samples can stand one after the other in rows of a fixed length (see `trainer.models`).

    A row has one side or several (source, target); each sample takes positions on every side.
    """

    def sides(self, sample: Encoded) -> tuple[int, ...]:
        """Positions that `sample` takes on each side of a row."""

    def collate_rows(self, rows: Sequence[Sequence[Encoded]], row_lengths: tuple[int, ...]) -> Batch:
        """One row for each of `rows`, its samples in order, in rectangles of exactly `row_lengths` (one for each side).

        With the fields of `collate` come segment ids and position ids, int64: the samples of a row are the segments
        1, 2, ..., padding is 0; positions count from 0 within each sample.
        """


@runtime_checkable
class Augments(Protocol):
    """A task that trains on its samples anew each time: an image is cropped or mirrored. Evaluation does not ask."""

    def augment(self, sample: Encoded, seed: int) -> Encoded:
        """What is trained on in place of `sample`, of the same size: a function of it and `seed` alone.

        seed: from 0 to below 2^64, another one each time a sample comes; it depends on the run's seed and the sample's
        place in the stream, not on ranks, workers or resuming.
        """


@runtime_checkable
class GeneratesText(Protocol):
    """A task whose model writes text (`python -m trainer.generate`)."""

    def encode_prompts(self, texts: Sequence[str]) -> list[Encoded | BadRecord]:
        """Samples without a target, one result per text, in order."""

    def generate(
        self,
        model: Any,
        samples: Sequence[Encoded],
        all_finished: AllFinished | None = None,
        beam_size: int | None = None,
        max_length: int | None = None,
    ) -> list[str]:
        """What `model` (in evaluation mode) writes for each sample; None takes the task's own setting."""


@runtime_checkable
class ScoresText(GeneratesText, Protocol):
    """A task whose evaluation compares generated text with references."""

    def source_and_reference(self, record: Record) -> tuple[str, str]:
        """The two texts of a record that `encode` accepted."""

    def score(
        self, hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str]
    ) -> dict[str, float | str]:
        """Corpus scores by name; strings are signatures that say how a score was computed."""
