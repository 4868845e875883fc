"""What there is to tell of an experiment's data; plain values, which `dataclasses.asdict` makes ready for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Field:
    """An array of a sample. ids, pieces: of a text, its tokens and the text of each; otherwise empty. text: the text
    that the tokens spell, or the values in words."""

    name: str
    shape: list[int]
    ids: list[int]
    pieces: list[str]
    text: str


@dataclass(frozen=True, slots=True)
class Example:
    """A sample; record: what it was made from, as read."""

    id: str
    fields: list[Field]
    record: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row of the first global batch. used: positions that its samples take on each side."""

    samples: list[Example]
    used: dict[str, int]


@dataclass(frozen=True, slots=True)
class Rejection:
    """Records that gave no sample for one reason, in which N stands for any number. first: places and what was wrong
    there."""

    stage: str
    reason: str
    count: int
    first: list[str]


@dataclass(frozen=True, slots=True)
class Counts:
    """What a pass found. samples: pieces of long texts count each; bad: records that cannot be read or used; removed:
    by stages; duplicates: records that equal an earlier one of their source but for case and white space; overlong:
    records longer than the task allows, be they skipped, cut or split; seconds: of reading and encoding."""

    records: int
    samples: int
    target_tokens: int
    bad: int
    removed: int
    duplicates: int
    overlong: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SourceFigures:
    """One source. complete: whether the pass came to its end; removed, changed: records, and places, by stage."""

    name: str
    path: str
    shards: list[str]
    complete: bool
    counts: Counts
    removed: dict[str, int]
    changed: dict[str, int]
    rejections: list[Rejection]
    examples: list[Example]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of the samples on one side. counts: samples by length, ascending."""

    side: str
    mean: float
    median: int
    p95: int
    longest: int
    counts: dict[int, int]


@dataclass(frozen=True, slots=True)
class Batches:
    """The first steps of training on one rank. epochs: passes over the data that they make; padding, first_padding:
    share of all positions of the steps, and of the first."""

    steps: int
    epochs: float
    samples: int
    padding: float
    first_padding: float


@dataclass(frozen=True, slots=True)
class Figures:
    """All of it.

    stride: lanes that read shards of their own, 1 = all lanes read one sequence; row_lengths: of packed rows, by side;
    labels: samples by value of single whole numbers, by field; shapes: samples by shape, of fields that are no text;
    epoch_seconds: of reading and encoding, None where the pass was cut short; batches: None where training would stop
    before the last of them.
    """

    tokenizer: str
    lanes: int
    stride: int
    batching: str
    row_lengths: list[int] | None
    warnings: list[str]
    sources: list[SourceFigures]
    rows: list[ShownRow]
    lengths: list[Lengths]
    labels: dict[str, dict[str, int]]
    shapes: dict[str, dict[str, int]]
    totals: Counts
    overlong_share: float
    tokens_per_second: float
    epoch_seconds: float | None
    batches: Batches | None
