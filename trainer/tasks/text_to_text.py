"""Text to text by an encoder-decoder: what translation, summarisation, question answering and span corruption share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trainer.errors import ConfigError
from trainer.tasks import AS_SET, IGNORE, AllFinished, BadRecord, Batch, Decoding, Encoded, LossSums, Record
from trainer.tasks.loss import check_loss, token_loss
from trainer.tasks.text import (
    TextTokenizer,
    check_overlong,
    limit_length,
    num_labels,
    number_segments,
    pack_rows,
    pad_rows,
    start_id,
    text_at,
    write_texts,
)


class SourceToTarget:
    """Batches of samples with `source_ids` and `target_ids` (int32, each with its end token), and their loss."""

    objective = "text_to_text"

    def __init__(
        self, tokenizer: TextTokenizer, label_smoothing: float, z_loss: float = 0.0, start_token: str | None = None
    ) -> None:
        """start_token: what a target begins with, None = the tokenizer's begin token. Raises ConfigError for options
        that cannot be."""
        check_loss(label_smoothing, z_loss)
        self.start_id = start_id(tokenizer, start_token)
        self._tokenizer = tokenizer
        self._label_smoothing = label_smoothing
        self._z_loss = z_loss

    def collate(self, samples: Sequence[Encoded]) -> Batch:
        """`source_ids` [B,S] int64, `source_mask` [B,S] bool, `decoder_input_ids` [B,T] int64, `labels` [B,T] int64."""
        targets = [sample.fields["target_ids"] for sample in samples]
        labels = pad_rows(targets, IGNORE)
        decoder_input = np.full_like(labels, self._tokenizer.pad_id)
        decoder_input[:, 0] = self.start_id
        decoder_input[:, 1:] = np.where(labels[:, 1:] == IGNORE, self._tokenizer.pad_id, labels[:, :-1])
        batch = self._collate_sources(samples)
        batch["decoder_input_ids"] = torch.from_numpy(decoder_input)
        batch["labels"] = torch.from_numpy(labels)
        return batch

    def _collate_sources(self, samples: Sequence[Encoded]) -> Batch:
        sources = [sample.fields["source_ids"] for sample in samples]
        source_ids = pad_rows(sources, self._tokenizer.pad_id)
        lengths = np.asarray([len(source) for source in sources])
        mask = np.arange(source_ids.shape[1]) < lengths[:, None]
        return {"source_ids": torch.from_numpy(source_ids), "source_mask": torch.from_numpy(mask)}

    def loss(self, model: Any, batch: Batch) -> LossSums:
        """Label-smoothed cross-entropy summed over the target tokens, the end tokens included."""
        return token_loss(model, batch, self._label_smoothing, self._z_loss)

    def num_positions(self, batch: Batch) -> tuple[int, int]:
        """Source and target positions of the rectangles, and how many of them are padding."""
        total = batch["source_ids"].numel() + batch["labels"].numel()
        return total, total - int(np.count_nonzero(batch["source_mask"].numpy())) - num_labels(batch)

    def flops_per_sample_lengths(self, batch: Batch) -> dict[str, int]:
        """The sides of the rectangles."""
        return {"source_length": batch["source_ids"].shape[1], "target_length": batch["labels"].shape[1]}

    def headline(self) -> tuple[str, str]:
        """The loss (plain negative log-likelihood per token), which every evaluation has."""
        return "eval/loss", "min"


class TextToText(SourceToTarget):
    """A text of the record in, another out: teacher-forced cross-entropy, and beam search in evaluation.

    A task of this kind adds its scores (see `trainer.tasks.ScoresText`), and `source_text` and `target_text` where they
    are more than a column.
    """

    max_length_ratio: float | None = None
    """Tokens that the search may write for one of the source; None: as many as `max_target_length`."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        source_column: str,
        target_column: str,
        *,
        label_smoothing: float,
        beam_size: int,
        length_penalty: float,
        length_penalty_kind: str,
        max_source_length: int,
        max_target_length: int,
        overlong: str,
        prefix: str = "",
        z_loss: float = 0.0,
        start_token: str | None = None,
    ) -> None:
        """max_source_length, max_target_length: tokens with the end token; a longer record is skipped, or cut with
        overlong="truncate". prefix: what every source begins with. Raises ConfigError for options that cannot be."""
        super().__init__(tokenizer, label_smoothing, z_loss, start_token)
        check_overlong(overlong)
        for key, value in (("max_source_length", max_source_length), ("max_target_length", max_target_length)):
            if value < 2:
                raise ConfigError(f"task.{key}={value}: a sentence takes at least 2 tokens, one of them the end.")
        self.required_columns: Sequence[str] = (source_column, target_column)
        self.max_length = max(max_source_length, max_target_length)
        self._source_column = source_column
        self._target_column = target_column
        self._beam_size = beam_size
        self._length_penalty = {"length_penalty": length_penalty, "length_penalty_kind": length_penalty_kind}
        self._max_source_length = max_source_length
        self._max_target_length = max_target_length
        self._overlong = overlong
        self._prefix = prefix

    def source_text(self, record: Record) -> str | BadRecord:
        """What the encoder reads of a record, without the prefix."""
        return text_at(record, self._source_column)

    def target_text(self, record: Record) -> str | BadRecord:
        """What the decoder shall write."""
        return text_at(record, self._target_column)

    def encode(self, records: Sequence[Record]) -> list[Encoded | BadRecord]:
        """`source_ids`, `target_ids`: int32, each with the end token."""
        sources = self._encode_sources([self.source_text(record) for record in records])
        targets = self._encode_texts(
            [self.target_text(record) for record in records],
            "task.max_target_length",
            self._max_target_length,
            self._tokenizer.for_targets,
        )
        return [self._join(source, target) for source, target in zip(sources, targets, strict=True)]

    def _encode_sources(self, texts: Sequence[str | BadRecord]) -> list[list[int] | BadRecord]:
        prefixed = [text if isinstance(text, BadRecord) else self._prefix + text for text in texts]
        return self._encode_texts(prefixed, "task.max_source_length", self._max_source_length, self._tokenizer)

    def _encode_texts(
        self, texts: Sequence[str | BadRecord], key: str, limit: int, tokenizer: TextTokenizer
    ) -> list[list[int] | BadRecord]:
        ids = iter(tokenizer.encode_batch([text for text in texts if isinstance(text, str)]))
        return [
            text
            if isinstance(text, BadRecord)
            else limit_length([*next(ids), self._tokenizer.eos_id], key, limit, self._overlong)
            for text in texts
        ]

    @staticmethod
    def _join(source: list[int] | BadRecord, target: list[int] | BadRecord) -> Encoded | BadRecord:
        if isinstance(source, BadRecord):
            return source
        if isinstance(target, BadRecord):
            return target
        fields = {"source_ids": np.asarray(source, np.int32), "target_ids": np.asarray(target, np.int32)}
        return Encoded(fields, length=max(len(source), len(target)), num_target_tokens=len(target))

    def pieces(self, sample: Encoded) -> list[Encoded]:
        """Always one: half a source has no target."""
        return [sample]

    def sides(self, sample: Encoded) -> tuple[int, ...]:
        """Source and target."""
        return len(sample.fields["source_ids"]), len(sample.fields["target_ids"])

    def collate_rows(self, rows: Sequence[Sequence[Encoded]], row_lengths: tuple[int, ...]) -> Batch:
        """`collate`'s fields, and `source_segment_ids`, `source_position_ids` [B,S] int64, `target_...` [B,T] int64.

        S, T = `row_lengths`. Each target begins with the begin token in `decoder_input_ids`.
        """
        pad, start = self._tokenizer.pad_id, self.start_id
        sources = [[sample.fields["source_ids"] for sample in row] for row in rows]
        targets = [[sample.fields["target_ids"] for sample in row] for row in rows]
        source_segments, source_positions = number_segments([[*map(len, row)] for row in sources], row_lengths[0])
        target_segments, target_positions = number_segments([[*map(len, row)] for row in targets], row_lengths[1])
        labels = pack_rows(targets, row_lengths[1], IGNORE)
        decoder_input = np.select(
            [target_segments == 0, target_positions == 0], [pad, start], np.roll(labels, 1, axis=1)
        )
        arrays = {
            "source_ids": pack_rows(sources, row_lengths[0], pad),
            "source_mask": source_segments > 0,
            "source_segment_ids": source_segments,
            "source_position_ids": source_positions,
            "decoder_input_ids": decoder_input,
            "labels": labels,
            "target_segment_ids": target_segments,
            "target_position_ids": target_positions,
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def target_bytes(self, record: Record, sample: Encoded) -> int:
        """UTF-8 bytes of the target text, as far as it was kept."""
        if sample.num_target_tokens == self._max_target_length:  # may have been cut
            return len(self._tokenizer.decode(sample.fields["target_ids"].tolist()).encode())
        text = self.target_text(record)
        assert isinstance(text, str), "the record was accepted by encode"
        return len(text.encode())

    def encode_prompts(self, texts: Sequence[str]) -> list[Encoded | BadRecord]:
        """Sources without a target."""
        checked = [text if text.strip() else BadRecord("the text is empty") for text in texts]
        return [
            source
            if isinstance(source, BadRecord)
            else Encoded({"source_ids": np.asarray(source, np.int32)}, length=len(source), num_target_tokens=0)
            for source in self._encode_sources(checked)
        ]

    def generate(
        self,
        model: Any,
        samples: Sequence[Encoded],
        all_finished: AllFinished | None = None,
        how: Decoding = AS_SET,
    ) -> list[str]:
        """The best hypothesis of the beam search for each sample's source."""
        beams = {
            "beam_size": self._beam_size,
            "max_length": self._max_target_length,
            "max_length_ratio": self.max_length_ratio,
            **self._length_penalty,
        }
        sources = self._collate_sources(samples)
        return write_texts(model, sources, self._tokenizer, self.start_id, beams, how, all_finished)

    def source_and_reference(self, record: Record) -> tuple[str, str]:
        """The two texts."""
        source, target = self.source_text(record), self.target_text(record)
        assert isinstance(source, str) and isinstance(target, str), "the record was accepted by encode"
        return source, target
