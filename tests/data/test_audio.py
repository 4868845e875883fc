"""Recordings: decoding, resampling, and features equal to those of transformers' extractor."""

from __future__ import annotations

import io
import json
import sys
import wave

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.data import audio
from trainer.errors import SetupError

pytest.importorskip("soundfile")


def tone(hertz: float, seconds: float = 0.5, rate: int = 16_000) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate).astype(np.float32)


def wav(samples: np.ndarray, rate: int = 16_000) -> bytes:
    """[n] or [n, channels] as 16-bit WAV."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as out:
        out.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((samples * 32767).round().astype("<i2").tobytes())
    return buffer.getvalue()


@pytest.mark.parametrize(("seconds", "mels"), [(0.03, 80), (1.2345, 80), (3.0, 128)])
def test_features_are_those_of_whisper(seconds: float, mels: int) -> None:
    transformers = pytest.importorskip("transformers")
    count = int(seconds * 16_000)
    noise = np.random.default_rng(0).standard_normal(count).astype(np.float32)
    samples = 0.3 * tone(440.0, seconds)[:count] + 0.02 * noise * np.linspace(0, 1, count, dtype=np.float32)
    theirs = transformers.WhisperFeatureExtractor(feature_size=mels)
    expected = theirs(samples, sampling_rate=16_000, padding="do_not_pad", return_tensors="np").input_features[0].T
    features = audio.log_mel(samples, mels)
    assert features.dtype == np.float32 and features.shape == (count // 160, mels)
    np.testing.assert_allclose(features, expected, atol=1e-4)


def test_features_of_half_a_minute_with_silence_are_whispers_own() -> None:
    transformers = pytest.importorskip("transformers")
    samples = 0.3 * tone(300.0, 1.0)
    expected = transformers.WhisperFeatureExtractor()(samples, sampling_rate=16_000, return_tensors="np")
    features = audio.log_mel(np.pad(samples, (0, 480_000 - len(samples))))
    np.testing.assert_allclose(features, expected.input_features[0].T, atol=1e-4)


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000])
def test_resampling_keeps_a_tone(rate: int) -> None:
    found = audio.resample(tone(1000.0, 0.5, rate), rate)
    expected = tone(1000.0, 0.6)[: len(found)]
    assert found.dtype == np.float32 and len(found) == -(-(rate // 2) * 16_000 // rate)
    np.testing.assert_allclose(found[200:-200], expected[200:-200], atol=1e-4)


def test_resampling_takes_out_what_the_lower_rate_cannot_hold() -> None:
    assert np.abs(audio.resample(tone(9000.0, 0.5, 48_000), 48_000)[200:-200]).max() < 1e-3


def test_rates_without_a_common_measure_are_refused() -> None:
    with pytest.raises(ValueError, match="15999 Hz"):
        audio.resample(tone(100.0), 15_999)


def test_a_recording_comes_in_several_guises(tmp_path) -> None:
    samples = 0.5 * tone(500.0)
    (tmp_path / "a.wav").write_bytes(wav(samples))
    stereo = np.stack([samples, np.zeros_like(samples)], axis=1)
    for value, expected in (
        (wav(samples), samples),
        (str(tmp_path / "a.wav"), samples),
        ({"bytes": wav(samples), "path": "gone.wav"}, samples),
        ({"bytes": None, "path": str(tmp_path / "a.wav")}, samples),
        ({"array": samples.tolist(), "sampling_rate": 16_000}, samples),
        ({"array": stereo.T, "sampling_rate": 16_000}, samples / 2),
        (wav(stereo), samples / 2),
    ):
        found = audio.waveform(value)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert len(audio.waveform(wav(samples, 8_000))) == 2 * len(samples)


def test_flac_is_read() -> None:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, tone(500.0), 16_000, format="FLAC")
    np.testing.assert_allclose(audio.waveform(buffer.getvalue()), tone(500.0), atol=1e-4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"no recording at all", "it cannot be decoded"),
        (wav(tone(500.0))[:40], "it cannot be decoded|no samples"),
        (wav(np.zeros(0)), "no samples"),
        ("/nowhere/a.wav", "it cannot be decoded"),
        (7, "it holds int, not bytes or the path of a recording"),
        ({"bytes": None, "path": None}, "it holds NoneType"),
        ({"array": [0.0, float("nan")], "sampling_rate": 16_000}, "not finite"),
        ({"array": [0.0], "sampling_rate": None}, "sampling_rate=None"),
    ],
)
def test_what_is_no_recording_says_why(value, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        audio.waveform(value)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(SetupError, match=r"install shardwright\[speech\]"):
        audio.waveform(wav(tone(500.0)))


def test_recordings_of_a_data_set_come_as_bytes(tmp_path) -> None:
    """Not decoded by `datasets`, which needs a library of its own for it."""
    pytest.importorskip("datasets")
    from trainer.data.hub import HubSource

    features = {"audio": {"_type": "Audio"}, "text": {"dtype": "string", "_type": "Value"}}
    table = pa.Table.from_pylist([{"audio": {"bytes": wav(0.5 * tone(500.0)), "path": "a.wav"}, "text": "a"}])
    told = json.dumps({"info": {"features": features}})
    pq.write_table(table.replace_schema_metadata({"huggingface": told}), tmp_path / "train.parquet")
    source = HubSource(str(tmp_path), None, "train", 1)
    (row,) = source.open(0, 0)
    assert row["audio"]["path"] == "a.wav" and len(audio.waveform(row["audio"])) == 8_000
