from __future__ import annotations

import builtins
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data.fakes import steps_of
from trainer.data.stream import StreamData
from trainer.errors import ConfigError, SetupError
from trainer.models.resnet import ResNet
from trainer.tasks import BadRecord, DrawsNoise, Encoded
from trainer.tasks.image_classification import ImageClassification

Image = pytest.importorskip("PIL.Image")

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)


def task_of(**options: Any) -> ImageClassification:
    return ImageClassification("image", "label", 3, **{"image_size": [3, 4], "channels": 1, **options})


def encoded_image(pixels: Any, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def pixels_of(task: ImageClassification, image: Any) -> Any:
    (sample,) = task.encode([{"image": image, "label": 1}])
    assert isinstance(sample, Encoded), sample
    return sample.fields["inputs"]


@pytest.mark.parametrize(
    "image",
    [
        GREY,
        GREY.tolist(),
        GREY.flatten(),
        GREY.astype(np.int64)[:, :, None],
        encoded_image(GREY),
        {"bytes": encoded_image(GREY), "path": "a.png"},
        Image.fromarray(GREY),
    ],
    ids=["array", "lists", "flat", "with channels", "png", "image feature", "pillow"],
)
def test_every_way_to_write_an_image_is_the_same_image(image: Any) -> None:
    assert np.array_equal(pixels_of(task_of(), image), GREY[None])


def test_channels_come_first_and_are_made_as_many_as_wanted() -> None:
    assert np.array_equal(pixels_of(task_of(channels=3), encoded_image(COLOUR)), COLOUR.transpose(2, 0, 1))
    assert np.array_equal(pixels_of(task_of(channels=3), GREY), np.stack([GREY] * 3))
    assert pixels_of(task_of(), COLOUR).shape == (1, 3, 4)


def test_a_jpeg_is_close_to_what_it_was() -> None:
    smooth = np.full((16, 16), 90, np.uint8)
    seen = pixels_of(task_of(image_size=[16, 16]), encoded_image(smooth, "JPEG"))
    assert np.abs(seen.astype(int) - 90).max() <= 2


def test_other_sizes_are_cut_or_stretched() -> None:
    """The left half black, the middle white."""
    wide = np.zeros((8, 32), np.uint8)
    wide[:, 12:20] = 255
    assert (pixels_of(task_of(image_size=[4, 4], fit="crop"), wide)[0, :, 1:3] == 255).all()
    stretched = pixels_of(task_of(image_size=[4, 4], fit="stretch"), wide)[0]
    assert (stretched[:, 0] < 30).all() and (stretched[:, 1] < 200).all()


def test_batches_are_normalised() -> None:
    task = task_of(image_size=[1, 2], channels=3, mean=[0.0, 0.5, 1.0], std=[1.0, 0.5, 0.25])
    batch = task.collate(task.encode([{"image": [0, 51, 102, 255, 255, 255], "label": 2}]))  # type: ignore[arg-type]
    expected = [[[0.0, 1.0]], [[-0.6, 1.0]], [[-2.4, 0.0]]]
    torch.testing.assert_close(batch["inputs"], torch.tensor([expected]))
    assert batch["inputs"].dtype == torch.float32 and batch["labels"].tolist() == [2]


def test_augmented_images_are_parts_of_the_padded_one_and_mirrored_half_the_time() -> None:
    task = task_of(crop_padding=1, flip=True)
    assert isinstance(task, DrawsNoise)
    (sample,) = task.encode([{"image": GREY + 1, "label": 0}])
    assert isinstance(sample, Encoded)
    padded = np.pad(GREY + 1, 1)
    crops = {padded[top : top + 3, left : left + 4].tobytes() for top in range(3) for left in range(3)}
    mirrored = {np.frombuffer(crop, np.uint8).reshape(3, 4)[:, ::-1].tobytes() for crop in crops}
    seen = [task.augment(sample, seed).fields["inputs"][0].tobytes() for seed in range(300)]
    assert set(seen) == crops | mirrored
    assert 100 < sum(image in mirrored for image in seen) < 200
    again = task.augment(sample, 7).fields["inputs"]
    assert np.array_equal(again, task.augment(sample, 7).fields["inputs"])
    assert task.collate([task.augment(sample, seed) for seed in range(4)])["inputs"].shape == (4, 1, 3, 4)


def test_nothing_is_changed_unless_asked() -> None:
    (sample,) = task_of().encode([{"image": GREY, "label": 0}])
    assert isinstance(sample, Encoded)
    assert task_of().augment(sample, 5) is sample


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"no image", "holds 8 bytes that are no whole image"),
        (encoded_image(COLOUR)[:44], "holds 44 bytes that are no whole image"),
        ({"bytes": None, "path": "a.png"}, "holds an image without bytes; a path alone is not followed"),
        ("a.png", "holds str, not bytes of an image or pixels from 0 to 255"),
        (None, "holds NoneType, not bytes"),
        ([[0.5, 0.1]], "holds numbers with fractions"),
        ([[0, 256]], "holds pixels from 0 to 256, not from 0 to 255"),
        ([[1, 2], [3]], "holds rows of different lengths"),
        ([1, 2, 3], "holds pixels in the shape [3], not [height, width]"),
        (np.zeros((0, 4), np.uint8), "holds pixels in the shape [0, 4, 1]"),
        (np.zeros((3, 4, 2), np.uint8), "holds pixels in the shape [3, 4, 2]"),
    ],
)
def test_what_is_no_image_says_why(image: Any, reason: str) -> None:
    (bad,) = task_of().encode([{"image": image, "label": 0}])
    assert isinstance(bad, BadRecord)
    assert bad.reason.startswith(f"column 'image' {reason}"), bad


def test_labels_are_checked_as_in_any_classification() -> None:
    (bad,) = task_of().encode([{"image": GREY, "label": 3}])
    assert bad == BadRecord("column 'label' holds 3, not an integer from 0 to 2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": [28]}, r"task\.image_size=\[28\]"),
        ({"image_size": [0, 4]}, r"task\.image_size=\[0, 4\]"),
        ({"channels": 2}, r"task\.channels=2"),
        ({"mean": [0.1, 0.2]}, r"task\.mean=\[0\.1, 0\.2\]"),
        ({"std": [0.0]}, r"task\.std=\[0\.0\] must be above 0"),
        ({"crop_padding": -1}, r"task\.crop_padding=-1"),
        ({"num_classes": 1}, r"task\.num_classes=1"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageClassification("image", "label", **{"num_classes": 2, **options})


def test_without_pillow_pixels_still_work_and_encoded_images_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "PIL":
            raise ImportError(name)
        return real(name, *args, **options)

    png = encoded_image(GREY)
    monkeypatch.setattr(builtins, "__import__", without)
    assert np.array_equal(pixels_of(task_of(), GREY), GREY[None])
    with pytest.raises(SetupError, match=r"shardwright\[vision\]"):
        task_of().encode([{"image": png, "label": 0}])


def test_gradients_do_not_depend_on_ranks_and_micro_batches(tmp_path: Path) -> None:
    """Encoded images from a Parquet file, cropped and mirrored, through a network with norms."""
    draw = np.random.default_rng(0)
    images = [encoded_image(draw.integers(0, 256, (9, 9), np.uint8)) for _ in range(30)]
    rows = [{"image": {"bytes": image, "path": None}, "label": index % 3} for index, image in enumerate(images)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    model = ResNet((8, 8), 3, in_channels=1, layers=[1], channels=[4], stem="small", norm_groups=2)
    task = task_of(image_size=[8, 8], crop_padding=2, flip=True)

    def gradient(world_size: int, micro_size: int) -> list[torch.Tensor]:
        model.reset_parameters(torch.Generator().manual_seed(0))
        model.zero_grad()
        data = StreamData(str(tmp_path), lanes=4, block=4)
        options = {"task": task, "global_size": 8, "micro_size": micro_size}
        for steps in steps_of(data, 3, world_size=world_size, **options):
            for batch in (batch for step in steps for batch in step.micro_batches):
                task.loss(model, batch).objective.backward()  # type: ignore[no-untyped-call]
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    whole = gradient(1, 8)
    assert len(whole) == len(list(model.parameters())) and all(bool(one.abs().max() > 0) for one in whole)
    for one, other in zip(whole, gradient(2, 2), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_only_training_sees_augmented_images() -> None:
    """The stream gives noise to samples of training, where the task asks for it."""
    task = task_of(crop_padding=2, flip=True)
    (sample,) = task.encode([{"image": GREY, "label": 0}])
    assert isinstance(sample, Encoded)
    assert isinstance(task, DrawsNoise) and not isinstance(task_of(), DrawsNoise)
    plain = task.collate([sample])["inputs"]
    assert torch.equal(plain, task.collate([sample])["inputs"])
    noisy = [task.collate([sample._replace(noise=noise)])["inputs"] for noise in range(8)]
    assert any(not torch.equal(plain, one) for one in noisy)
