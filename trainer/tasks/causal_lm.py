"""Causal language modelling: every token is predicted from those before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainer.errors import ConfigError
from trainer.tasks import AS_SET, AllFinished, BadRecord, Batch, Decoding, Encoded, LossSums, Record
from trainer.tasks.loss import check_loss, token_loss
from trainer.tasks.text import (
    OVERLONG_CHOICES,
    TextTokenizer,
    check_overlong,
    limit_length,
    next_token_batch,
    next_token_rows,
    num_unmasked,
    pad_rows,
    text_at,
)

if TYPE_CHECKING:
    import numpy.typing as npt


class CausalLM:
    """Next-token cross-entropy on texts of bounded length; evaluated by loss, perplexity and bits per byte.

    One record is one sample: begin token + text is read, text + end token is predicted. Records should therefore be
    prepared to fit `sequence_length` tokens (the packaged corpus has groups of paragraphs of at most about 1,500
    bytes); a longer one is skipped and counted, cut with overlong="truncate", or goes on in further samples with
    overlong="split".
    """

    objective = "causal_lm"

    def __init__(
        self,
        tokenizer: TextTokenizer,
        text_column: str,
        sequence_length: int,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        overlong: str = "skip",
        temperature: float = 0.8,
        top_k: int = 40,
    ) -> None:
        """temperature, top_k: of the sampling in `generate`. Raises ConfigError for options that cannot be."""
        check_overlong(overlong, (*OVERLONG_CHOICES, "split"))
        check_loss(label_smoothing, z_loss)
        if sequence_length < 2:
            raise ConfigError(f"task.sequence_length={sequence_length}: a text takes at least 2 tokens.")
        self.required_columns: tuple[str, ...] = (text_column,)
        self.max_length = sequence_length
        self._tokenizer = tokenizer
        self._end_id = tokenizer.eos_id  # what ends a text in `generate`
        self._text_column = text_column
        self._sequence_length = sequence_length
        self._label_smoothing = label_smoothing
        self._z_loss = z_loss
        self._overlong = overlong
        self._temperature = temperature
        self._top_k = top_k

    def encode(self, records: Sequence[Record]) -> list[Encoded | BadRecord]:
        """`ids` int32: begin token, text, end token; one longer than the sample's positions.

        With overlong="split" a sample may be longer than `sequence_length`: `pieces` cuts it.
        """
        return self._encode_texts([text_at(record, self._text_column) for record in records])

    def _encode_texts(self, texts: Sequence[str | BadRecord]) -> list[Encoded | BadRecord]:
        ids = iter(self._tokenizer.encode_batch([text for text in texts if isinstance(text, str)]))
        return [text if isinstance(text, BadRecord) else self._encode_ids(next(ids)) for text in texts]

    def _encode_ids(self, ids: list[int]) -> Encoded | BadRecord:
        limited = limit_length(
            [*ids, self._tokenizer.eos_id], "task.sequence_length", self._sequence_length, self._overlong
        )
        if isinstance(limited, BadRecord):
            return limited
        fields = {"ids": np.asarray([self._tokenizer.bos_id, *limited], np.int32)}
        return Encoded(fields, length=len(limited), num_target_tokens=len(limited))

    def pieces(self, sample: Encoded) -> list[Encoded]:
        """Samples of at most `sequence_length` positions that predict each token of `sample` once.

        Each begins with the token that the one before it predicts last; there is no new begin token.
        """
        step = self._sequence_length
        if sample.length <= step:
            return [sample]
        parts = (sample.fields["ids"][start : start + step + 1] for start in range(0, sample.length, step))
        return [Encoded({"ids": ids}, length=len(ids) - 1, num_target_tokens=len(ids) - 1) for ids in parts]

    def collate(self, samples: Sequence[Encoded]) -> Batch:
        """`input_ids` [B,T] int64, `attention_mask` [B,T] bool, `labels` [B,T] int64."""
        inputs, labels = zip(*map(self._inputs_and_labels, samples), strict=True)
        return next_token_batch(inputs, labels, self._tokenizer.pad_id)

    @staticmethod
    def _inputs_and_labels(sample: Encoded) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """What each position of a sample reads, and what it predicts."""
        return sample.fields["ids"][:-1], sample.fields["ids"][1:]

    def sides(self, sample: Encoded) -> tuple[int, ...]:
        """The one side."""
        return (sample.length,)

    def collate_rows(self, rows: Sequence[Sequence[Encoded]], row_lengths: tuple[int, ...]) -> Batch:
        """`collate`'s fields, `segment_ids` [B,T] int64, `position_ids` [B,T] int64; T = `row_lengths[0]`."""
        (length,) = row_lengths
        pairs = [[self._inputs_and_labels(sample) for sample in row] for row in rows]
        inputs, labels = ([[pair[side] for pair in row] for row in pairs] for side in (0, 1))
        return next_token_rows(inputs, labels, length, self._tokenizer.pad_id)

    def loss(self, model: Any, batch: Batch) -> LossSums:
        """Cross-entropy summed over all real tokens, the end tokens included."""
        return token_loss(model, batch, self._label_smoothing, self._z_loss)

    def num_positions(self, batch: Batch) -> tuple[int, int]:
        """Positions of the rectangle, and how many of them are padding."""
        total = batch["labels"].numel()
        return total, total - num_unmasked(batch)

    def flops_per_sample_lengths(self, batch: Batch) -> dict[str, int]:
        """The side of the rectangle."""
        return {"target_length": batch["labels"].shape[1]}

    def headline(self) -> tuple[str, str]:
        """The loss."""
        return "eval/loss", "min"

    def target_bytes(self, record: Record, sample: Encoded) -> int:
        """UTF-8 bytes of the text, as far as it was kept; of a text in pieces the first counts all."""
        ids = sample.fields["ids"]
        if self._overlong == "truncate" and sample.length == self._sequence_length:  # may have been cut
            return len(self._tokenizer.decode(ids[1:-1].tolist()).encode())
        if ids[0] != self._tokenizer.bos_id:  # which no text contains
            return 0
        text = text_at(record, self._text_column)
        assert isinstance(text, str), "the record was accepted by encode"
        return len(text.encode())

    def encode_prompts(self, texts: Sequence[str]) -> list[Encoded | BadRecord]:
        """Begin token + text, to be continued; an empty text is a prompt too."""
        ids = self._tokenizer.encode_batch(list(texts))
        return [self._encode_prompt([self._tokenizer.bos_id, *one]) for one in ids]

    def _encode_prompt(self, ids: list[int]) -> Encoded | BadRecord:
        limited = limit_length(ids, "task.sequence_length", self._sequence_length - 1, "skip")
        if isinstance(limited, BadRecord):
            return limited
        return Encoded({"ids": np.asarray(limited, np.int32)}, length=len(limited), num_target_tokens=0)

    def generate(
        self,
        model: Any,
        samples: Sequence[Encoded],
        all_finished: AllFinished | None = None,
        how: Decoding = AS_SET,
    ) -> list[str]:
        """A continuation of each prompt: sampled, the same at every call, or as `how` says."""
        from trainer import decoding

        tokenizer = self._tokenizer
        device = next(model.parameters()).device
        ids = pad_rows([sample.fields["ids"] for sample in samples], tokenizer.pad_id)
        lengths = np.asarray([sample.length for sample in samples])
        mask = np.arange(ids.shape[1]) < lengths[:, None]
        batch = {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}
        longest = how.max_length or self._sequence_length
        options: decoding.BeamOptions | decoding.SampleOptions
        options = decoding.SampleOptions(longest, self._temperature, self._top_k)
        if how.beam_size is not None or how.samples:
            options = decoding.chosen(how, decoding.BeamOptions(how.beam_size or 1, longest))
        special = tokenizer.bos_id, self._end_id, tokenizer.pad_id
        written = decoding.write(model, batch, special, options, how.seed, all_finished)
        return tokenizer.decode_batch(written)
