from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.test_audio import tone, wav
from trainer.data.audio import log_mel
from trainer.errors import ConfigError, DataError, SetupError
from trainer.models.mlp import MLP
from trainer.models.speech import SpeechToText
from trainer.parts import check_fit
from trainer.tasks import IGNORE, BadRecord, Decoding, Encoded, PacksRows, ScoresText
from trainer.tasks.speech_recognition import SpeechRecognition

pytest.importorskip("soundfile")
pytest.importorskip("jiwer")


def record(seconds: float = 0.5, text: str = "ab", **more: Any) -> dict[str, Any]:
    return {"audio": {"bytes": wav(0.5 * tone(500.0, seconds)), "path": "a.wav"}, "text": text, **more}


def encoded(task: SpeechRecognition, *records: dict[str, Any]) -> list[Encoded]:
    samples = task.encode(records)
    assert all(isinstance(sample, Encoded) for sample in samples), samples
    return samples  # type: ignore[return-value]


def test_batches_are_as_long_as_their_longest_and_hide_the_rest(tokenizer: Any) -> None:
    task = SpeechRecognition(tokenizer)
    samples = encoded(task, record(0.5, "ab"), record(0.2, "abc"))
    assert [sample.length for sample in samples] == [50, 20]
    assert [sample.num_target_tokens for sample in samples] == [3, 4]
    batch = task.collate(samples)
    assert batch["features"].shape == (2, 50, 80) and batch["features"].dtype == torch.float32
    assert batch["source_mask"].sum(1).tolist() == [50, 20]
    assert not batch["features"][1, 20:].any() and batch["features"][1, :20].any()
    assert batch["labels"].tolist() == [[100, 101, 2, IGNORE], [100, 101, 102, 2]]
    assert batch["decoder_input_ids"].tolist() == [[1, 100, 101, 0], [1, 100, 101, 102]]
    assert task.num_positions(batch) == (108, 31)
    assert task.flops_per_sample_lengths(batch) == {"source_length": 50, "target_length": 4}
    assert task.target_bytes(record(), samples[0]) == 2
    assert task.pieces(samples[0]) == [samples[0]] and not isinstance(task, PacksRows)


def test_filled_recordings_are_whispers_own_and_nothing_is_hidden(tokenizer: Any) -> None:
    transformers = pytest.importorskip("transformers")
    task = SpeechRecognition(tokenizer, max_seconds=1.0, fill=True)
    batch = task.collate(encoded(task, record(0.5), record(0.01)))  # the second is shorter than a frame
    assert "source_mask" not in batch and batch["features"].shape == (2, 100, 80)
    theirs = transformers.WhisperFeatureExtractor(chunk_length=1)
    expected = theirs(0.5 * tone(500.0), sampling_rate=16_000, return_tensors="pt").input_features[0].T
    torch.testing.assert_close(batch["features"][0], expected, atol=2e-3, rtol=0)  # float16, and a WAV of 16 bits


def test_features_are_whispers_own() -> None:
    """Of a sound that comes and goes under noise, before they are kept in 16 bits."""
    transformers = pytest.importorskip("transformers")
    noise = np.random.default_rng(0).standard_normal(len(tone(500.0, 2.0))).astype(np.float32)
    samples = 0.3 * tone(500.0, 2.0) * np.linspace(0, 1, len(noise), dtype=np.float32) + 0.02 * noise
    theirs = transformers.WhisperFeatureExtractor(chunk_length=2)(samples, sampling_rate=16_000, return_tensors="np")
    np.testing.assert_allclose(log_mel(samples, 80), theirs.input_features[0].T, atol=1e-5, rtol=0)


def test_loss_is_that_of_the_labels(tokenizer: Any) -> None:
    task = SpeechRecognition(tokenizer, label_smoothing=0.0)
    batch = task.collate(encoded(task, record(0.5, "ab"), record(0.2, "abc")))
    logits = torch.randn(2, 4, 259, generator=torch.Generator().manual_seed(0))
    sums = task.loss(lambda given: logits, batch)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    torch.testing.assert_close(sums.objective, expected)
    assert sums.num_target_tokens.item() == 7


def test_evaluation_gives_error_rates(tokenizer: Any) -> None:
    task = SpeechRecognition(tokenizer)
    assert isinstance(task, ScoresText)
    assert task.source_and_reference(record(text="x y")) == ("a.wav", "x y")
    scores = task.score(["ein hund", "die katze sass"], ["ein hund", "die katze sitzt da"], ["a.wav", "b.wav"])
    assert scores["wer"] == pytest.approx(2 / 6)
    assert scores["cer"] == pytest.approx(7 / 26)
    assert task.score(["", ""], ["a", "b c"], ["", ""]) == {"wer": 1.0, "cer": 1.0}
    assert task.headline() == ("eval/loss", "min")


def test_files_are_written_down(tokenizer: Any, tmp_path: Path) -> None:
    task = SpeechRecognition(tokenizer, num_mels=8, max_target_length=20)
    (tmp_path / "a.wav").write_bytes(wav(tone(500.0)))
    model = SpeechToText(259, num_mels=8, d_model=16, num_heads=2, d_ff=16, encoder_layers=1, decoder_layers=1)
    model.reset_parameters(torch.Generator().manual_seed(0))
    sample, bad = task.encode_prompts([str(tmp_path / "a.wav"), "nowhere.wav"])
    assert isinstance(sample, Encoded) and isinstance(bad, BadRecord) and bad.reason.startswith("nowhere.wav: ")
    with torch.inference_mode():
        (text,) = task.generate(model.eval(), [sample], how=Decoding(beam_size=2, max_length=5))
        (longer,) = task.generate(model.eval(), [sample])
    assert isinstance(text, str) and len(text.encode()) <= 15 and isinstance(longer, str)


def test_a_model_learns_to_write_down_tones(tokenizer: Any) -> None:
    """From recordings to text and error rates, with all that stands between; two of the four are of two tones."""
    task = SpeechRecognition(tokenizer, num_mels=16, label_smoothing=0.0, beam_size=2, max_target_length=8)
    sounds = {"a": 0.5 * tone(300.0, 0.2), "b": 0.5 * tone(1500.0, 0.3)}
    texts = ["a", "b", "ab", "ba"]
    rows = [{"audio": {"bytes": wav(np.concatenate([sounds[name] for name in text]))}, "text": text} for text in texts]
    samples = encoded(task, *rows)
    batch = task.collate(samples)
    model = SpeechToText(
        259, num_mels=16, d_model=32, num_heads=2, d_ff=64, encoder_layers=1, decoder_layers=1, max_positions=8
    )
    model.reset_parameters(torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    with torch.inference_mode():
        before = task.score(task.generate(model.eval(), samples), texts, texts)
    for _ in range(60):
        optimizer.zero_grad()
        task.loss(model.train(), batch).objective.backward()
        optimizer.step()
    with torch.inference_mode():
        after = task.score(task.generate(model.eval(), samples), texts, texts)
    assert before["wer"] == 1.0 and after == {"wer": 0.0, "cer": 0.0}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"text": "a"}, "column 'audio' is missing"),
        ({"audio": None, "text": "a"}, "column 'audio' is empty"),
        ({"audio": {"bytes": b"nothing", "path": None}, "text": "a"}, "column 'audio': it cannot be decoded"),
        ({"audio": {"bytes": wav(np.zeros(100)), "path": None}, "text": "a"}, "shorter than a frame of 25 ms"),
        ({"audio": b"", "text": " "}, "column 'text' is empty"),
        (record(2.0), r"a recording of 2.00 seconds is over task.max_seconds=1 (task.overlong=skip)"),
        (record(text="a" * 40), "41 tokens are more than task.max_target_length=10 (task.overlong=skip)"),
    ],
)
def test_a_record_that_cannot_be_used_says_why(tokenizer: Any, bad: dict[str, Any], reason: str) -> None:
    (found,) = SpeechRecognition(tokenizer, max_seconds=1.0, max_target_length=10).encode([bad])
    assert isinstance(found, BadRecord) and reason in found.reason


def test_too_long_a_record_can_end_the_run(tokenizer: Any) -> None:
    task = SpeechRecognition(tokenizer, max_seconds=1.0, overlong="refuse")
    with pytest.raises(DataError, match=r"2\.00 seconds is over task\.max_seconds=1 \(task\.overlong=refuse\)"):
        task.encode([record(2.0)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlong": "truncate"}, "task.overlong=truncate"),
        ({"max_seconds": 0.0}, "task.max_seconds=0"),
        ({"max_target_length": 1}, "task.max_target_length=1"),
        ({"label_smoothing": 1.0}, "task.label_smoothing=1"),
    ],
)
def test_options_that_cannot_be_are_refused(tokenizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeechRecognition(tokenizer, **options)


def test_a_missing_library_names_the_extra(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"jiwer and soundfile; install shardwright\[speech\]"):
        SpeechRecognition(tokenizer)


def test_model_and_task_have_to_fit(tokenizer: Any) -> None:
    from trainer.composition import compose
    from trainer.config import to_config

    words = ["experiment=digits_mlp", "name=x"]
    config = to_config(compose(words))
    speech = SpeechToText(259, num_mels=8, d_model=16, num_heads=2, d_ff=16, encoder_layers=1, decoder_layers=1)
    with pytest.raises(ConfigError, match="SpeechRecognition gives recordings, which MLP does not take"):
        check_fit(config, SpeechRecognition(tokenizer), MLP(4, 2), None)
    with pytest.raises(ConfigError, match=r"task\.num_mels=80 is not model\.num_mels=8"):
        check_fit(config, SpeechRecognition(tokenizer), speech, None)
    with pytest.raises(ConfigError, match=r"up to 4000 frames, more than the 3000 of model\.max_source_positions"):
        check_fit(config, SpeechRecognition(tokenizer, num_mels=8, max_seconds=40.0), speech, None)
    check_fit(config, SpeechRecognition(tokenizer, num_mels=8), speech, None)
