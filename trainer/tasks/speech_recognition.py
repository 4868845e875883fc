"""Speech recognition: a recording in, its text out."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainer.data.audio import FRAMES_PER_SECOND, SAMPLE_RATE, WINDOW, log_mel, waveform
from trainer.data.sources import column
from trainer.errors import ConfigError, DataError, SetupError
from trainer.tasks import AS_SET, IGNORE, AllFinished, BadRecord, Batch, Decoding, Encoded, LossSums, Record
from trainer.tasks.loss import token_loss
from trainer.tasks.text import TextTokenizer, check_overlong, num_labels, pad_rows, text_at, write_texts

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAX_TOKENS_PER_FRAME = 0.25  # of a hypothesis: an untrained model does not find the end


class SpeechRecognition:
    """Teacher-forced cross-entropy; evaluated by beam search, word and character error rates.

    audio_column: recordings, as `trainer.data.audio.waveform` takes them; num_mels: as the model has. max_seconds: of a
    recording; max_target_length: tokens of a text with its end; overlong: a longer record is skipped (skip) or ends the
    run (refuse). fill: add silence up to max_seconds to every recording and hide nothing from the model, as Whisper
    wants it; false: batches are as long as their longest, and the rest is hidden. beam_size, length_penalty,
    length_penalty_kind: of the beam search in evaluation (`trainer.decoding.BeamOptions`).
    prompt: names of the tokens that every text begins with, which carry no loss and which the model is given when it
    writes; None: the tokenizer's begin token. A published Whisper wants "<|startoftranscript|>", language, task,
    "<|notimestamps|>".
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        audio_column: str = "audio",
        text_column: str = "text",
        num_mels: int = 80,
        max_seconds: float = 30.0,
        fill: bool = False,
        label_smoothing: float = 0.1,
        beam_size: int = 4,
        length_penalty: float = 1.0,
        length_penalty_kind: str = "gnmt",
        max_target_length: int = 128,
        overlong: str = "skip",
        prompt: Sequence[str] | None = None,
    ) -> None:
        """Raises ConfigError for options that cannot be, SetupError where a library is missing."""
        check_overlong(overlong, ("skip", "refuse"))
        if not 0.0 <= label_smoothing < 1.0:
            raise ConfigError(f"task.label_smoothing={label_smoothing}: use a number from 0 to below 1.")
        if not max_seconds * SAMPLE_RATE >= WINDOW:
            raise ConfigError(f"task.max_seconds={max_seconds}: a frame takes {WINDOW / SAMPLE_RATE} seconds.")
        if max_target_length < 2:
            raise ConfigError(
                f"task.max_target_length={max_target_length}: a text takes at least 2 tokens, one of them the end."
            )
        missing = [name for name in ("jiwer", "soundfile") if importlib.util.find_spec(name) is None]
        if missing:
            raise SetupError(f"Speech recognition needs {' and '.join(missing)}; install shardwright[speech].")
        self.required_columns = (audio_column, text_column)
        self._begin = _begin(tokenizer, prompt)
        self.start_id = self._begin[0]
        self.max_length = len(self._begin) - 1 + max_target_length
        self._max_target_length = max_target_length
        self.num_mels = num_mels
        self.max_frames = int(max_seconds * FRAMES_PER_SECOND)
        self._tokenizer = tokenizer
        self._audio_column = audio_column
        self._text_column = text_column
        self._max_seconds = max_seconds
        self._fill = fill
        self._label_smoothing = label_smoothing
        self._beam_size = beam_size
        self._length_penalty = {"length_penalty": length_penalty, "length_penalty_kind": length_penalty_kind}
        self._overlong = overlong

    def encode(self, records: Sequence[Record]) -> list[Encoded | BadRecord]:
        """`features` float16 [frames, num_mels], `target_ids` int32 with the end-of-sentence token."""
        return [self._encode_one(record) for record in records]

    def _encode_one(self, record: Record) -> Encoded | BadRecord:
        text = text_at(record, self._text_column)
        if isinstance(text, BadRecord):
            return text
        (ids,) = self._tokenizer.encode_batch([text])
        target = np.asarray([*ids, self._tokenizer.eos_id], np.int32)
        if len(target) > self._max_target_length:
            most = f"task.max_target_length={self._max_target_length}"
            return self._too_long(f"{len(target)} tokens are more than {most}")
        try:
            value = column(record, self._audio_column)
        except KeyError:
            return BadRecord(f"column '{self._audio_column}' is missing")
        features = self._features(value, f"column '{self._audio_column}'")
        if isinstance(features, BadRecord):
            return features
        fields: dict[str, NDArray[Any]] = {"features": features, "target_ids": target}
        return Encoded(fields, length=max(len(features), len(target)), num_target_tokens=len(target))

    def _features(self, value: Any, place: str) -> NDArray[np.float16] | BadRecord:
        """[frames, num_mels] of a recording, or why there are none."""
        if value is None:
            return BadRecord(f"{place} is empty")
        try:
            samples = waveform(value)
        except ValueError as error:
            return BadRecord(f"{place}: {error}")
        most = self.max_frames * SAMPLE_RATE // FRAMES_PER_SECOND
        if len(samples) > most:
            seconds = len(samples) / SAMPLE_RATE
            return self._too_long(
                f"a recording of {seconds:.2f} seconds is over task.max_seconds={self._max_seconds:g}"
            )
        if self._fill:
            samples = np.pad(samples, (0, most - len(samples)))
        elif len(samples) < WINDOW:
            return BadRecord(f"{place}: the recording is shorter than a frame of {1000 * WINDOW // SAMPLE_RATE} ms")
        return log_mel(samples, self.num_mels).astype(np.float16)

    def _too_long(self, what: str) -> BadRecord:
        if self._overlong == "refuse":
            raise DataError(f"A record is too long: {what} (task.overlong=refuse). Raise the limit, or use skip.")
        return BadRecord(f"{what} (task.overlong=skip)")

    def pieces(self, sample: Encoded) -> list[Encoded]:
        """Always one: nothing says which words belong to half a recording."""
        return [sample]

    def collate(self, samples: Sequence[Encoded]) -> Batch:
        """`features` [B,S,num_mels] float32, `source_mask` [B,S] bool (none with `fill`), `decoder_input_ids` and
        `labels` [B,T] int64."""
        targets = pad_rows([sample.fields["target_ids"] for sample in samples], IGNORE)
        prompt = len(self._begin) - 1
        labels = np.pad(targets, ((0, 0), (prompt, 0)), constant_values=IGNORE)
        decoder_input = np.full_like(labels, self._tokenizer.pad_id)
        decoder_input[:, : prompt + 1] = self._begin
        decoder_input[:, prompt + 1 :] = np.where(targets[:, 1:] == IGNORE, self._tokenizer.pad_id, targets[:, :-1])
        batch = self._collate_features(samples)
        batch["decoder_input_ids"] = torch.from_numpy(decoder_input)
        batch["labels"] = torch.from_numpy(labels)
        return batch

    def _collate_features(self, samples: Sequence[Encoded]) -> Batch:
        lengths = np.asarray([len(sample.fields["features"]) for sample in samples])
        features = np.zeros((len(samples), lengths.max(), self.num_mels), np.float32)
        for row, sample in zip(features, samples, strict=True):
            row[: len(sample.fields["features"])] = sample.fields["features"]
        batch = {"features": torch.from_numpy(features)}
        if not self._fill:
            batch["source_mask"] = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None])
        return batch

    def loss(self, model: Any, batch: Batch) -> LossSums:
        """Label-smoothed cross-entropy summed over the target tokens, the end-of-sentence tokens included."""
        return token_loss(model, batch, self._label_smoothing)

    def num_positions(self, batch: Batch) -> tuple[int, int]:
        """Frames and target positions of the rectangles, and how many of them are padding; silence is none."""
        rows, frames, _ = batch["features"].shape
        hidden = int(np.count_nonzero(~batch["source_mask"].numpy())) if "source_mask" in batch else 0
        targets = batch["labels"].numel()
        return rows * frames + targets, hidden + targets - num_labels(batch)

    def flops_per_sample_lengths(self, batch: Batch) -> dict[str, int]:
        """Frames and target positions."""
        return {"source_length": batch["features"].shape[1], "target_length": batch["labels"].shape[1]}

    def headline(self) -> tuple[str, str]:
        """The loss (plain negative log-likelihood per token), which every evaluation has."""
        return "eval/loss", "min"

    def target_bytes(self, record: Record, sample: Encoded) -> int:
        """UTF-8 bytes of the text."""
        return len(self.source_and_reference(record)[1].encode())

    def encode_prompts(self, texts: Sequence[str]) -> list[Encoded | BadRecord]:
        """Recordings without a target; `texts` are the paths of their files."""
        found = [self._features(path, path) for path in texts]
        return [
            features
            if isinstance(features, BadRecord)
            else Encoded({"features": features}, length=len(features), num_target_tokens=0)
            for features in found
        ]

    def generate(
        self,
        model: Any,
        samples: Sequence[Encoded],
        all_finished: AllFinished | None = None,
        how: Decoding = AS_SET,
    ) -> list[str]:
        """See `trainer.tasks.GeneratesText`; at most 10 tokens more than 25 a second of the recording."""
        beams = {
            "beam_size": self._beam_size,
            "max_length": self._max_target_length,
            "max_length_ratio": _MAX_TOKENS_PER_FRAME,
            **self._length_penalty,
        }
        features = self._collate_features(samples)
        return write_texts(model, features, self._tokenizer, self._begin, beams, how, all_finished)

    def source_and_reference(self, record: Record) -> tuple[str, str]:
        """The name of the recording's file, where it has one, and the text."""
        audio, text = column(record, self._audio_column), text_at(record, self._text_column)
        assert isinstance(text, str), "the record was accepted by encode"
        name = audio.get("path") if isinstance(audio, Mapping) else audio
        return (name if isinstance(name, str) else ""), text

    def score(
        self, hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str]
    ) -> dict[str, float | str]:
        """Word and character error rates by jiwer (edits / words or characters of the references; 0 is perfect).

        Of the texts as they are: case and punctuation count. Words are what white space separates.
        """
        import jiwer

        return {
            "wer": float(jiwer.wer(list(references), list(hypotheses))),
            "cer": float(jiwer.cer(list(references), list(hypotheses))),
        }


def _begin(tokenizer: TextTokenizer, prompt: Sequence[str] | None) -> list[int]:
    """The ids that a text begins with. Raises ConfigError for a token that there is not."""
    if prompt is None:
        return [tokenizer.bos_id]
    ids = {name: tokenizer.id_of(name) for name in prompt}
    missing = [str(name) for name, id_ in ids.items() if id_ is None]
    if missing or not ids:
        what = f"{', '.join(missing)} is no token of the tokenizer's" if missing else "it names no token"
        raise ConfigError(f"task.prompt={list(prompt)}: {what}; name those a text begins with, or null.")
    return [id_ for name in prompt if (id_ := ids[name]) is not None]
