"""Image classification: an image in, one of `num_classes` labels out."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.errors import ConfigError, SetupError
from trainer.tasks import BadRecord, Batch, Encoded
from trainer.tasks.classification import Classification, check_class_names

Pixels = NDArray[np.uint8]

_MODES = {1: "L", 3: "RGB"}
"""Pillow's names of the numbers of channels."""


class ImageClassification(Classification):
    """Images of any size, resized, normalised, and in training cropped and mirrored at random.

    image_column: an encoded image (PNG, JPEG or whatever Pillow reads; bytes, or {"bytes": ...} as the Image feature of
    `datasets` stores it), or pixels from 0 to 255: height x width, height x width x channels, or flat in that order and
    of `image_size`. label_column: integers in [0, num_classes). image_size: (height, width) of what the model gets;
    channels: 1 (grey) or 3 (red, green, blue); fit: how other sizes are resized, "crop" keeps the shape, covers
    `image_size` and cuts what is over evenly, "stretch" keeps everything. mean, std: of each channel, or one number for
    all; the model gets (pixel / 255 - mean) / std. crop_padding: in training, black pixels around an image, of which a
    part of `image_size` is cut at random (He et al. 2015, section 4.2); flip: in training, mirror half of the images
    left to right. class_names: what an export calls the labels, in their order.
    """

    def __init__(
        self,
        image_column: str,
        label_column: str,
        num_classes: int,
        image_size: Sequence[int] = (224, 224),
        channels: int = 3,
        fit: Literal["crop", "stretch"] = "crop",
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        crop_padding: int = 0,
        flip: bool = False,
        label_smoothing: float = 0.0,
        class_names: Sequence[str] | None = None,
        tokenizer: Any = None,
    ) -> None:
        """`tokenizer` is not used. Raises ConfigError for options that cannot be."""
        super().__init__(image_column, label_column, num_classes, label_smoothing=label_smoothing)
        _check(image_size, channels, mean, std, crop_padding)
        check_class_names(class_names, num_classes)
        self.class_names = class_names
        self.channels, self.fit, self.mean, self.std = channels, fit, list(mean), list(std)
        self.height, self.width = image_size
        deviation = torch.tensor(list(std), dtype=torch.float32)[:, None, None]
        self._scale = 1 / (255 * deviation)
        self._shift = torch.tensor(list(mean), dtype=torch.float32)[:, None, None] / deviation
        self._crop_padding = crop_padding
        self._flip = flip
        if crop_padding or flip:
            self.draws_noise: Literal[True] = True

    def _read(self, value: Any) -> Pixels | BadRecord:
        """`inputs` uint8 [channels, height, width]; normalised in `collate`, so that what waits is a quarter as large.

        Raises SetupError where Pillow is needed and missing.
        """
        if isinstance(value, Mapping):
            value = value.get("bytes")
            if value is None:
                return BadRecord("holds an image without bytes; a path alone is not followed")
        if isinstance(value, bytes | bytearray | memoryview):
            return self._decode(bytes(value))
        if hasattr(value, "convert"):  # an image of Pillow, as `datasets` streams them
            return self._resized(value)
        return self._from_numbers(value)

    def _decode(self, encoded: bytes) -> Pixels | BadRecord:
        library = _pillow()
        try:
            with library.open(io.BytesIO(encoded)) as image:
                return self._resized(image)
        except (OSError, ValueError, SyntaxError, EOFError, library.DecompressionBombError) as error:
            return BadRecord(f"holds {len(encoded)} bytes that are no whole image: {str(error) or 'damaged'}")

    def _from_numbers(self, value: Any) -> Pixels | BadRecord:
        try:
            numbers = np.asarray(value)
        except ValueError:  # rows of different lengths
            return BadRecord("holds rows of different lengths, not an image")
        if numbers.dtype.kind not in "iu":
            held = "numbers with fractions" if numbers.dtype.kind == "f" else type(value).__name__
            return BadRecord(f"holds {held}, not bytes of an image or pixels from 0 to 255")
        if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) <= 255:
            return BadRecord(f"holds pixels from {numbers.min()} to {numbers.max()}, not from 0 to 255")
        wanted = self.height, self.width, self.channels
        if numbers.ndim == 1 and numbers.size == np.prod(wanted):
            numbers = numbers.reshape(wanted)
        elif numbers.ndim == 2:
            numbers = numbers[:, :, None]
        if numbers.ndim != 3 or 0 in numbers.shape or numbers.shape[2] not in _MODES:
            return BadRecord(
                f"holds pixels in the shape {list(numbers.shape)}, not [height, width], [height, width, 1 or 3] or flat"
                f" as task.image_size={[self.height, self.width]} x {self.channels} says"
            )
        pixels: Pixels = numbers.astype(np.uint8)
        if pixels.shape != wanted:
            return self._resized(_pillow().fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _resized(self, image: Any) -> Pixels:
        """An image of Pillow as the model sees it."""
        library = _pillow()
        image = image.convert(_MODES[self.channels])
        size = self.width, self.height
        if image.size != size:
            covering = _covering(image.size, size) if self.fit == "crop" else size
            image = image.resize(covering, library.Resampling.BILINEAR)
            left, top = ((has - wanted) // 2 for has, wanted in zip(covering, size, strict=True))
            image = image.crop((left, top, left + self.width, top + self.height))
        pixels = np.asarray(image, dtype=np.uint8).reshape(self.height, self.width, self.channels)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def augment(self, sample: Encoded, seed: int) -> Encoded:
        """A crop of the padded image, then perhaps its mirror image: a function of `sample` and `seed` alone."""
        if not self._crop_padding and not self._flip:
            return sample
        image = sample.fields["inputs"]
        top, left, mirror = np.random.PCG64(seed).random_raw(3).tolist()
        if self._crop_padding:
            around, places = self._crop_padding, 2 * self._crop_padding + 1
            padded = np.pad(image, ((0, 0), (around, around), (around, around)))
            top, left = top % places, left % places
            image = padded[:, top : top + self.height, left : left + self.width]
        if self._flip and mirror % 2:
            image = image[:, :, ::-1]
        return sample._replace(fields={**sample.fields, "inputs": image})

    def collate(self, samples: Sequence[Encoded]) -> Batch:
        """`inputs` [B, channels, height, width] float32, normalised; `labels` [B] int64."""
        batch = super().collate([one if one.noise is None else self.augment(one, one.noise) for one in samples])
        return {**batch, "inputs": batch["inputs"] * self._scale - self._shift}


def _covering(has: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int]:
    """The size of the shape of `has` in which one side is as `wanted` and the other no shorter, rounded down."""
    (width, height), (to_width, to_height) = has, wanted
    if to_width * height >= to_height * width:
        return to_width, max(to_height, int(to_width * height / width))
    return max(to_width, int(to_height * width / height)), to_height


def _pillow() -> Any:
    """The module PIL.Image. Raises SetupError where it is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise SetupError("Decoding and resizing images needs Pillow; install shardwright[vision].") from error
    return Image


def _check(
    image_size: Sequence[int], channels: int, mean: Sequence[float], std: Sequence[float], crop_padding: int
) -> None:
    problems = []
    if len(image_size) != 2 or min(image_size) < 1:
        problems.append(f"task.image_size={list(image_size)} must be a height and a width of at least 1.")
    if channels not in _MODES:
        problems.append(f"task.channels={channels} must be 1 (grey) or 3 (red, green, blue).")
    for key, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            problems.append(f"task.{key}={list(values)} must be one number, or one for each of {channels} channels.")
    if any(value <= 0 for value in std):
        problems.append(f"task.std={list(std)} must be above 0: images are divided by it.")
    if crop_padding < 0:
        problems.append(f"task.crop_padding={crop_padding} must be at least 0.")
    if problems:
        raise ConfigError(*problems)
