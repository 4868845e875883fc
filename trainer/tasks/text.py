"""What the tasks on text share: reading a column, limiting a length, padding to a rectangle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from trainer.data.sources import column
from trainer.errors import ConfigError
from trainer.tasks import IGNORE, AllFinished, BadRecord, Batch, Decoding, Record

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

    @property
    def for_targets(self) -> TextTokenizer:
        """What encodes targets."""

    def id_of(self, token: str) -> int | None:
        """Of an entry of the vocabulary, by its name; None where there is none."""


def check_overlong(choice: str, choices: Sequence[str] = OVERLONG_CHOICES) -> None:
    """Raises ConfigError unless `choice` is one of `choices`."""
    if choice not in choices:
        raise ConfigError(f"task.overlong={choice} is not known; choose one of {', '.join(choices)}.")


def start_id(tokenizer: TextTokenizer, start_token: str | None) -> int:
    """The id that a target begins with: of `start_token`, None = the tokenizer's begin token. Raises ConfigError."""
    if start_token is None:
        return tokenizer.bos_id
    found = tokenizer.id_of(start_token)
    if found is None:
        raise ConfigError(
            f"task.start_token={start_token} is no token of the tokenizer's; name one, such as </s>, or null."
        )
    return found


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

    Longer ones lose what stands before the end token if `overlong` is "truncate", and stay whole if it is "split" (the
    task cuts them into pieces later); otherwise the BadRecord names both numbers.
    """
    if len(ids) <= limit or overlong == "split":
        return ids
    if overlong == "truncate":
        return [*ids[: limit - 1], ids[-1]]
    return BadRecord(f"{len(ids)} tokens are more than {key}={limit} (task.overlong=skip)")


def num_labels(batch: Batch) -> int:
    """Positions of a batch on the CPU that carry loss; by numpy, which starts no threads beside the tokenizer's."""
    return int(np.count_nonzero(batch["labels"].numpy() != IGNORE))


def pad_rows(rows: Sequence[npt.NDArray[Any]], value: int) -> npt.NDArray[np.int64]:
    """[B, longest] int64: each row filled up with `value`."""
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def pack_rows(rows: Sequence[Sequence[npt.NDArray[Any]]], length: int, value: int) -> npt.NDArray[np.int64]:
    """[B, length] int64: the parts of each row one after the other, then filled up with `value`."""
    packed = np.full((len(rows), length), value, dtype=np.int64)
    for index, parts in enumerate(rows):
        if parts:
            joined = np.concatenate(parts)
            assert len(joined) <= length, f"samples of {len(joined)} positions do not fit a row of {length}"
            packed[index, : len(joined)] = joined
    return packed


def number_segments(rows: Sequence[Sequence[int]], length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Segment ids and position ids, each [B, length] int64, of rows whose parts have these lengths.

    The parts of a row are 1, 2, ... and padding is 0; positions count from 0 within each part and are 0 on padding.
    """
    segments = np.zeros((len(rows), length), dtype=np.int64)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    for index, sizes in enumerate(rows):
        ends = np.cumsum(sizes)
        total = int(ends[-1]) if len(sizes) else 0
        segments[index, :total] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        positions[index, :total] = np.arange(total) - np.repeat(ends - sizes, sizes)
    return segments, positions


def next_token_batch(
    inputs: Sequence[npt.NDArray[Any]], labels: Sequence[npt.NDArray[Any]], pad_id: int
) -> dict[str, torch.Tensor]:
    """`input_ids` [B,T] int64, `attention_mask` [B,T] bool, `labels` [B,T] int64 of samples padded to the longest.

    labels: of each sample as many as `inputs`, IGNORE where nothing is to be predicted.
    """
    ids = pad_rows(inputs, pad_id)
    mask = np.arange(ids.shape[1]) < np.asarray([len(one) for one in inputs])[:, None]
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": pad_rows(labels, IGNORE)}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def next_token_rows(
    inputs: Sequence[Sequence[npt.NDArray[Any]]],
    labels: Sequence[Sequence[npt.NDArray[Any]]],
    length: int,
    pad_id: int,
) -> dict[str, torch.Tensor]:
    """`next_token_batch` of packed rows of `length` positions, with `segment_ids`, `position_ids` [B,T] int64."""
    ids = pack_rows(inputs, length, pad_id)
    segments, positions = number_segments([[*map(len, row)] for row in inputs], length)
    arrays = {
        "input_ids": ids,
        "attention_mask": segments > 0,
        "labels": pack_rows(labels, length, IGNORE),
        "segment_ids": segments,
        "position_ids": positions,
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def num_unmasked(batch: Batch) -> int:
    """Positions of a batch on the CPU that are no padding; by numpy, as `num_labels`."""
    return int(np.count_nonzero(batch["attention_mask"].numpy()))


def write_texts(
    model: Any,
    batch: Batch,
    tokenizer: TextTokenizer,
    begin: int | Sequence[int],
    beams: Mapping[str, Any],
    how: Decoding,
    all_finished: AllFinished | None,
) -> list[str]:
    """What an encoder-decoder writes for a batch of sources: by beam search with the task's options `beams` (of
    `trainer.decoding.BeamOptions`), but for what `how` says; where that sets a length, the source's limits no more."""
    from trainer import decoding

    device = next(model.parameters()).device
    said = {name: value for name in ("beam_size", "max_length") if (value := getattr(how, name)) is not None}
    if "max_length" in said:
        said["max_length_ratio"] = None
    options = decoding.chosen(how, decoding.BeamOptions(**{**beams, **said}))
    special_ids = begin, tokenizer.eos_id, tokenizer.pad_id
    sources = {name: tensor.to(device) for name, tensor in batch.items()}
    ids = decoding.write(model, sources, special_ids, options, how.seed, all_finished)
    return [text.strip() for text in tokenizer.decode_batch(ids)]
