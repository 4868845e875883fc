"""Masked language modelling (BERT, Devlin et al. 2019, section 3.1): hidden tokens are guessed from those around
them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from trainer.errors import ConfigError
from trainer.tasks import IGNORE, BadRecord, Batch, Encoded, LossSums, Record
from trainer.tasks.loss import token_loss
from trainer.tasks.text import (
    OVERLONG_CHOICES,
    TextTokenizer,
    check_overlong,
    number_segments,
    pack_rows,
    pad_rows,
    text_at,
)

Ids = npt.NDArray[Any]

_MASKED, _RANDOM = 0.8, 0.1
"""Of the chosen tokens: those that become the mask token, and a random one; the rest stay what they are."""


class MaskTokenizer(TextTokenizer, Protocol):
    """What this task needs of a tokenizer."""

    mask_id: int | None
    vocab_size: int


class MaskedLM:
    """Cross-entropy of the chosen tokens of a text; evaluated by loss, accuracy and perplexity on them.

    A sample is begin token + text + end token, of at most `sequence_length` tokens. Of the text's tokens
    `mask_fraction` are chosen: so many, rounded, and at least one. A chosen token is replaced by the mask token (80 %),
    by any of the vocabulary (10 %) or not at all (10 %). In training each epoch chooses anew, by the sample's `noise`;
    in an evaluation the choice is a function of the tokens alone, so every checkpoint is asked the same.

    overlong: a longer text is skipped, cut (truncate), or goes on in further samples (split).
    """

    draws_noise: Literal[True] = True
    objective = "masked_lm"

    def __init__(
        self,
        tokenizer: MaskTokenizer,
        text_column: str,
        sequence_length: int,
        mask_fraction: float = 0.15,
        overlong: str = "skip",
    ) -> None:
        """Raises ConfigError for options that cannot be, and a tokenizer without a mask token."""
        check_overlong(overlong, (*OVERLONG_CHOICES, "split"))
        if tokenizer.mask_id is None:
            raise ConfigError(
                "The tokenizer has no token for what is masked; set tokenizer.special_tokens=[<mask>], or use a"
                " tokenizer with <mask> or [MASK]."
            )
        if sequence_length < 3:
            raise ConfigError(f"task.sequence_length={sequence_length}: a text takes at least 3 tokens, two its ends.")
        if not 0.0 < mask_fraction < 1.0:
            raise ConfigError(f"task.mask_fraction={mask_fraction}: use a number between 0 and 1, such as 0.15.")
        self.required_columns = (text_column,)
        self.max_length = sequence_length
        self._mask_id = tokenizer.mask_id
        self._tokenizer = tokenizer
        self._text_column = text_column
        self._sequence_length = sequence_length
        self._mask_fraction = mask_fraction
        self._overlong = overlong

    def encode(self, records: Sequence[Record]) -> list[Encoded | BadRecord]:
        """`ids` int32: begin token, text, end token; nothing is masked yet.

        With overlong="split" a sample may be longer than `sequence_length`: `pieces` cuts it.
        """
        texts = [text_at(record, self._text_column) for record in records]
        ids = iter(self._tokenizer.encode_batch([text for text in texts if isinstance(text, str)]))
        return [text if isinstance(text, BadRecord) else self._encode_ids(next(ids)) for text in texts]

    def _encode_ids(self, ids: list[int]) -> Encoded | BadRecord:
        room = self._sequence_length - 2
        if not ids:
            return BadRecord(f"column '{self._text_column}' holds no token")
        if len(ids) > room and self._overlong == "skip":
            return BadRecord(
                f"{len(ids) + 2} tokens are more than task.sequence_length={self._sequence_length} (task.overlong=skip)"
            )
        return self._sample(np.asarray(ids[:room] if self._overlong == "truncate" else ids, np.int32))

    def _sample(self, text: Ids) -> Encoded:
        ids = np.concatenate(([self._tokenizer.bos_id], text, [self._tokenizer.eos_id])).astype(np.int32)
        return Encoded({"ids": ids}, length=len(ids), num_target_tokens=self._num_chosen(len(text)))

    def _num_chosen(self, num_tokens: int) -> int:
        return max(1, round(num_tokens * self._mask_fraction))

    def pieces(self, sample: Encoded) -> list[Encoded]:
        """The sample, or its text cut into samples of at most `sequence_length`, each with both ends."""
        if sample.length <= self._sequence_length:
            return [sample]
        text, room = sample.fields["ids"][1:-1], self._sequence_length - 2
        return [self._sample(text[start : start + room]) for start in range(0, len(text), room)]

    def _masked(self, sample: Encoded) -> tuple[Ids, Ids]:
        """(input ids, labels) of a sample: two arrays as long as it.

        By raw words of PCG64, as the order of the samples (see `trainer.data.order`): the same for good.
        """
        ids = sample.fields["ids"]
        noise = zlib.crc32(ids.tobytes()) if sample.noise is None else sample.noise
        num_tokens = len(ids) - 2
        words = np.random.PCG64(noise).random_raw(3 * num_tokens).reshape(3, num_tokens)
        chosen = np.argsort(words[0], kind="stable")[: sample.num_target_tokens]
        places = chosen + 1
        share, other = words[1, chosen] / 2.0**64, words[2, chosen] % np.uint64(self._tokenizer.vocab_size)
        inputs, labels = ids.astype(np.int64), np.full(len(ids), IGNORE, np.int64)
        labels[places] = inputs[places]
        inputs[places] = np.where(
            share < _MASKED, self._mask_id, np.where(share < _MASKED + _RANDOM, other, labels[places])
        )
        return inputs, labels

    def collate(self, samples: Sequence[Encoded]) -> Batch:
        """`input_ids` [B,T] int64, `attention_mask` [B,T] bool, `labels` [B,T] int64: IGNORE but for chosen tokens."""
        masked = [self._masked(sample) for sample in samples]
        lengths = np.asarray([sample.length for sample in samples])
        inputs = pad_rows([one for one, _ in masked], self._tokenizer.pad_id)
        return {
            "input_ids": torch.from_numpy(inputs),
            "attention_mask": torch.from_numpy(np.arange(inputs.shape[1]) < lengths[:, None]),
            "labels": torch.from_numpy(pad_rows([labels for _, labels in masked], IGNORE)),
        }

    def sides(self, sample: Encoded) -> tuple[int, ...]:
        """The one side."""
        return (sample.length,)

    def collate_rows(self, rows: Sequence[Sequence[Encoded]], row_lengths: tuple[int, ...]) -> Batch:
        """`collate`'s fields, `segment_ids` [B,T] int64, `position_ids` [B,T] int64; T = `row_lengths[0]`."""
        (length,) = row_lengths
        masked = [[self._masked(sample) for sample in row] for row in rows]
        inputs = pack_rows([[one for one, _ in row] for row in masked], length, self._tokenizer.pad_id)
        labels = pack_rows([[one for _, one in row] for row in masked], length, IGNORE)
        segments, positions = number_segments([[sample.length for sample in row] for row in rows], length)
        return {
            "input_ids": torch.from_numpy(inputs),
            "attention_mask": torch.from_numpy(segments > 0),
            "labels": torch.from_numpy(labels),
            "segment_ids": torch.from_numpy(segments),
            "position_ids": torch.from_numpy(positions),
        }

    def loss(self, model: Any, batch: Batch) -> LossSums:
        """Cross-entropy summed over the chosen tokens."""
        return token_loss(model, batch)

    def num_positions(self, batch: Batch) -> tuple[int, int]:
        """Positions of the rectangle, and how many of them are padding."""
        mask = batch["attention_mask"].numpy()
        return mask.size, mask.size - int(np.count_nonzero(mask))

    def flops_per_sample_lengths(self, batch: Batch) -> dict[str, int]:
        """The side of the rectangle."""
        return {"source_length": batch["input_ids"].shape[1]}

    def headline(self) -> tuple[str, str]:
        """The loss."""
        return "eval/loss", "min"

    def target_bytes(self, record: Record, sample: Encoded) -> int:
        """UTF-8 bytes of the chosen tokens' text."""
        _, labels = self._masked(sample)
        return len(self._tokenizer.decode(labels[labels != IGNORE].tolist()).encode())
