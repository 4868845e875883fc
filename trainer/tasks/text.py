"""What the tasks on text share: reading a column, limiting a length, padding to a rectangle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from trainer.data.sources import column
from trainer.errors import ConfigError
from trainer.tasks import BadRecord, Record

if TYPE_CHECKING:
    import numpy.typing as npt

OVERLONG_CHOICES = ("skip", "truncate")


class TextTokenizer(Protocol):
    """What these tasks need of a tokenizer (see `trainer.data.tokenizer`)."""

    pad_id: int
    bos_id: int
    eos_id: int

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids without special tokens."""

    def decode(self, ids: list[int]) -> str: ...

    def decode_batch(self, ids: list[list[int]]) -> list[str]: ...


def check_overlong(choice: str) -> None:
    """Raises ConfigError unless `choice` is one of OVERLONG_CHOICES."""
    if choice not in OVERLONG_CHOICES:
        raise ConfigError(f"task.overlong={choice} is not known; choose one of {', '.join(OVERLONG_CHOICES)}.")


def text_at(record: Record, path: str) -> str | BadRecord:
    """The text in the (dotted) column `path`, or why there is none."""
    try:
        value = column(record, path)
    except KeyError:
        return BadRecord(f"column '{path}' is missing")
    if value is None:
        return BadRecord(f"column '{path}' is empty")
    if not isinstance(value, str):
        return BadRecord(f"column '{path}' holds {type(value).__name__}, not text")
    if not value.strip():
        return BadRecord(f"column '{path}' is empty")
    return value


def limit_length(ids: list[int], key: str, limit: int, overlong: str) -> list[int] | BadRecord:
    """`ids`, which end with the end token, in at most `limit` tokens.

    Longer ones lose what stands before the end token if `overlong` is "truncate"; otherwise the BadRecord names both
    numbers.
    """
    if len(ids) <= limit:
        return ids
    if overlong == "truncate":
        return [*ids[: limit - 1], ids[-1]]
    return BadRecord(f"{len(ids)} tokens are more than {key}={limit} (task.overlong=skip)")


def pad_rows(rows: Sequence[npt.NDArray[Any]], value: int) -> npt.NDArray[np.int64]:
    """[B, longest] int64: each row filled up with `value`."""
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded
