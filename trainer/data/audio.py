"""Recordings: what a record holds as a waveform of 16 kHz, and its log-mel features as Whisper takes them."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from trainer.errors import SetupError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SAMPLE_RATE = 16_000
"""Samples a second of every waveform that is not told otherwise."""
WINDOW, HOP = 400, 160
"""Samples of a frame (25 ms) and between frames (10 ms)."""
FRAMES_PER_SECOND = SAMPLE_RATE // HOP

_RANGE = 8.0  # powers of ten below the loudest that features tell apart
_CROSSINGS, _ROLLOFF = 24, 0.95  # of the sinc in resampling: zero crossings on each side, pass band
_LARGEST_KERNEL = 10_000_000


def waveform(value: Any) -> NDArray[np.float32]:
    """Mono samples [n] in -1 .. 1 at SAMPLE_RATE of what a column of recordings holds.

    value: the bytes of a file (WAV, FLAC, OGG, MP3), the path of one, or a mapping as `datasets` has it: {"bytes"} or
    {"path"} of a file, or {"array" [n] or [channels, n], "sampling_rate"}. Channels are averaged. Raises ValueError,
    saying what is wrong, where it is no recording, and SetupError without the library that reads files.
    """
    if isinstance(value, Mapping) and value.get("array") is not None:
        samples, rate = np.asarray(value["array"], np.float32), value.get("sampling_rate")
        samples = samples.mean(axis=0) if samples.ndim == 2 else samples
        if samples.ndim != 1 or not isinstance(rate, int | np.integer) or rate < 1:
            raise ValueError(f"its array has {samples.ndim} dimensions and sampling_rate={rate!r}")
    else:
        samples, rate = _read(value)
    if not len(samples):
        raise ValueError("the recording has no samples")
    if not np.isfinite(samples).all():
        raise ValueError("the recording has samples that are not finite")
    return resample(samples, int(rate))


def _read(value: Any) -> tuple[NDArray[np.float32], int]:
    """(samples, rate) of a file."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package is there and its C library is not
        raise SetupError(
            f"Reading recordings needs soundfile, which cannot be imported ({error}); install shardwright[speech]."
        ) from error
    given = (value.get("bytes") or value.get("path")) if isinstance(value, Mapping) else value
    if not isinstance(given, bytes | str):
        raise ValueError(f"it holds {type(given).__name__}, not bytes or the path of a recording")
    try:
        samples, rate = soundfile.read(io.BytesIO(given) if isinstance(given, bytes) else given, dtype="float32")
    except (soundfile.SoundFileError, OSError, RuntimeError, TypeError) as error:
        raise ValueError(f"it cannot be decoded: {error}") from error
    return (samples.mean(axis=1) if samples.ndim == 2 else samples), rate


def resample(samples: NDArray[np.float32], rate: int, target: int = SAMPLE_RATE) -> NDArray[np.float32]:
    """[n] at `rate` -> [ceil(n target / rate)] at `target`, by band-limited interpolation (Smith & Gossett 1984).

    Each sample is a sum of neighbours weighted by a Hann-windowed sinc that lets through 95 % of the narrower band; the
    weights repeat after target / gcd samples, so they are a matrix. Raises ValueError for rates with too large a one.
    """
    divisor = math.gcd(rate, target)
    up, down = target // divisor, rate // divisor
    if up == down:
        return samples
    if up * down > _LARGEST_KERNEL:
        raise ValueError(
            f"its sampling rate of {rate} Hz has too little in common with {target} Hz; resample it before"
        )
    kernel, reach = _sinc_kernel(up, down)
    length = -(-len(samples) * up // down)
    padded = np.pad(samples, (reach, reach + down))
    windows = sliding_window_view(padded, len(kernel))[::down]
    resampled: NDArray[np.float32] = (windows @ kernel).reshape(-1)[:length]
    return resampled


@lru_cache(maxsize=8)
def _sinc_kernel(up: int, down: int) -> tuple[NDArray[np.float32], int]:
    """([taps, up], reach): weights of the samples from `reach` before a block of `down` for the `up` it becomes."""
    cutoff = _ROLLOFF * min(1.0, up / down)
    width = _CROSSINGS / cutoff
    reach = math.ceil(width)
    places = np.arange(2 * reach + down)[:, None] - reach - np.arange(up) * (down / up)
    window = np.where(np.abs(places) < width, np.cos(np.pi * places / (2 * width)) ** 2, 0.0)
    return (cutoff * np.sinc(cutoff * places) * window).astype(np.float32), reach


def log_mel(samples: NDArray[np.float32], num_mels: int = 80) -> NDArray[np.float32]:
    """Features [n // HOP, num_mels] of a waveform [n >= WINDOW] at SAMPLE_RATE, between -1.5 and 2 for most recordings.

    Power spectra of Hann windows, in mel bands; their logarithm to the base 10, cut off 8 below the largest, + 4, / 4
    (Whisper, Radford et al. 2022, section 2.2 and its published code; reflected at the ends).
    """
    padded = np.pad(samples, WINDOW // 2, mode="reflect")
    frames = sliding_window_view(padded, WINDOW)[::HOP][: len(samples) // HOP]
    spectrum = np.fft.rfft(frames * _hann(), axis=1)
    power = spectrum.real**2 + spectrum.imag**2
    logs = np.log10(np.maximum(power.astype(np.float32) @ mel_bands(num_mels), np.float32(1e-10)))
    features: NDArray[np.float32] = (np.maximum(logs, logs.max() - _RANGE) + 4.0) / 4.0
    return features


@lru_cache(maxsize=1)
def _hann() -> NDArray[np.float32]:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)


@lru_cache(maxsize=4)
def mel_bands(num_mels: int) -> NDArray[np.float32]:
    """[WINDOW / 2 + 1, num_mels]: triangles of equal area between points equally far apart in mels, up to 8 kHz.

    Slaney's mels (Auditory Toolbox, 1998): linear up to 1 kHz, where 15 of them are reached, then 27 for each factor of
    6.4.
    """
    mels = np.linspace(0.0, 15.0 + 27.0 * math.log(8.0) / math.log(6.4), num_mels + 2)
    edges = np.where(mels < 15.0, mels * (200.0 / 3.0), 1000.0 * 6.4 ** ((mels - 15.0) / 27.0))
    frequencies = np.linspace(0.0, SAMPLE_RATE / 2, WINDOW // 2 + 1)[:, None]
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    bands: NDArray[np.float32] = (np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (high - low))).astype(
        np.float32
    )
    return bands
