"""Tasks: what a record becomes, how samples make a batch, the loss of a batch, and what is measured.

One file per objective. A task is built by `_target_` with its options plus `tokenizer` (or None). The contract is
`Task` below, with `GeneratesText` and `ScoresText` for tasks that write text, `ScoresBatches` for those with metrics of
their own, `PacksRows` for those whose samples can share a row, `JoinsSamples` for those that make their samples of many
records, and `DrawsNoise` for those that choose anew every epoch. Every batch has `labels`; `IGNORE` (-100) there means
"this position carries no loss". A batch whose labels are all IGNORE weighs nothing: that is how ranks that ran out of
data keep step with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

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


@dataclass(frozen=True, slots=True)
class Decoding:
    """How text is to be written; None: as the task is set. A temperature, top_k or top_p asks for sampling, repeatable
    by `seed`; beam_size 1 is greedy; max_length: tokens at most, the end token included."""

    beam_size: int | None = None
    max_length: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return any(value is not None for value in (self.temperature, self.top_k, self.top_p))


AS_SET = Decoding()
"""As the task is set."""


class Encoded(NamedTuple):
    """A record made ready for batching.

    fields: arrays by name (token ids int32, inputs float32, pixels uint8); length: positions it takes in a batch (the
    key of length bucketing; for pairs the source and target lengths are compared in turn, so `length` is a tuple's
    maximum); num_target_tokens: positions that will carry loss; noise: of a task that `DrawsNoise`, in training, what
    the sample's random choices begin from.
    """

    fields: Mapping[str, np.ndarray[Any, Any]]
    length: int
    num_target_tokens: int
    noise: int | None = None


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
class JoinsSamples(Protocol):
    """A task that makes its samples of many records: texts one after the other, cut where it suits the objective."""

    def join(self, samples: Sequence[Encoded]) -> list[Encoded]:
        """What goes into batches for `samples` (at least one), which are what a lane drew for a block, or a part of a
        split: at least one sample, and a function of `samples` and their order alone."""


@runtime_checkable
class DrawsNoise(Protocol):
    """A task that makes other choices in a sample every epoch, such as what is masked.

    The stream gives each of its samples a `noise` of 64 bits, a function of (seed, epoch, place of the record), so that
    ranks, workers and resuming have no part in them. Samples of an evaluation have none.
    """

    draws_noise: Literal[True]


@runtime_checkable
class ScoresBatches(Protocol):
    """A task with metrics that are means, of samples or whatever it counts."""

    def batch_scores(self, model: Any, batch: Batch) -> dict[str, tuple[float, float]]:
        """(sum, count) of each metric over a batch, by name; a batch whose labels are all IGNORE counts nothing.

        Evaluation adds them up over batches and ranks and reports sum / count as eval/NAME; no logits are kept.
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
        how: Decoding = AS_SET,
    ) -> list[str]:
        """What `model` (in evaluation mode) writes for each sample, as the task is set but for what `how` says."""


@runtime_checkable
class ScoresText(GeneratesText, Protocol):
    """A task whose evaluation compares generated text with references."""

    def source_and_reference(self, record: Record) -> tuple[str, str]:
        """The two texts of a record that `encode` accepted."""

    def score(
        self, hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str]
    ) -> dict[str, float | str]:
        """Corpus scores by name; strings are signatures that say how a score was computed."""


@runtime_checkable
class Chats(Protocol):
    """A task whose model answers in conversations."""

    @property
    def chat_template(self) -> str:
        """The Jinja template by which conversations become text, which an export gives to the tokenizer."""

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
