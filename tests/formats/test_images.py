"""Image processors of transformers give the pixels that our task gives."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
image_module = pytest.importorskip("PIL.Image")

from tests.test_pretrained import here  # noqa: E402
from trainer.export.__main__ import main  # noqa: E402
from trainer.formats import PROCESSOR  # noqa: E402
from trainer.formats.images import image_processor  # noqa: E402
from trainer.restore import find_run, load_model  # noqa: E402
from trainer.tasks.image_classification import ImageClassification  # noqa: E402


def picture(height: int, width: int, channels: int):
    shape = (height, width, 3) if channels == 3 else (height, width)
    return image_module.fromarray(np.random.default_rng(height).integers(0, 256, shape, dtype=np.uint8))


def pixels_of(task: ImageClassification, image) -> torch.Tensor:
    stored = io.BytesIO()
    image.save(stored, "PNG")
    (sample,) = task.encode([{"image": stored.getvalue(), "label": 0}])
    return task.collate([sample])["inputs"]


@pytest.mark.parametrize("size", [(64, 48), (31, 97), (17, 16), (40, 40), (9, 12)])
@pytest.mark.parametrize(
    ("fit", "shape", "channels", "mean", "std"),
    [
        ("crop", [24, 24], 3, [0.48, 0.45, 0.4], [0.27, 0.26, 0.28]),
        ("crop", [15, 15], 1, [0.13], [0.31]),
        ("stretch", [12, 20], 3, [0.5], [0.5]),
    ],
)
def test_pixels(tmp_path: Path, size, fit, shape, channels, mean, std):
    task = ImageClassification("image", "label", 2, image_size=shape, channels=channels, fit=fit, mean=mean, std=std)
    (tmp_path / PROCESSOR).write_text(json.dumps(image_processor(task)))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    image = picture(*size, channels)
    theirs = processor(image, return_tensors="pt").pixel_values
    if processor.backend == "torchvision":  # rounds otherwise than Pillow where it resizes: by a 255th
        assert float((pixels_of(task, image) - theirs).abs().max()) <= 1.01 / 255 / min(std)
    else:
        torch.testing.assert_close(pixels_of(task, image), theirs, atol=1e-5, rtol=0)


def test_a_crop_that_is_no_square_has_no_processor():
    task = ImageClassification("image", "label", 2, image_size=[12, 20])
    assert image_processor(task) is None
    assert pixels_of(task, picture(33, 21, 3)).shape == (1, 3, 12, 20)


def test_an_exported_classifier_names_what_it_sees(tmp_path: Path):
    """transformers alone, from an image to the name of its class, as the run has it."""
    rows = [{"image": np.asarray(picture(8 + n, 8, 1)).tolist(), "label": n % 3} for n in range(4)]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (
        "model=vit_tiny model.image_size=[8,8] model.patch_size=4 model.in_channels=1 model.d_model=16"
        " model.num_heads=2 model.d_ff=16 model.num_layers=1 model.num_classes=3 task=image_classification"
        " task.num_classes=3 task.image_size=[8,8] task.channels=1 task.class_names=[cat,dog,owl] data=files"
        " tokenizer=none name=run steps=2 batch.global_size=4 schedule.warmup=0 optimizer.lr=1e-2 eval.final_split=none"
        " checkpoint=end logging=[] precision=fp32"
    )
    here([*words.split(), f"data.path={tmp_path}"], tmp_path / "runs")
    assert main([f"runs_dir={tmp_path / 'runs'}", "run=run", f"to={tmp_path / 'out'}", "dtype=fp32"]) == 0
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"} and model.config.label2id["owl"] == 2
    found = find_run("run", str(tmp_path / "runs"))
    task = ImageClassification(**{key: value for key, value in found.config.task.items() if key != "_target_"})
    image = picture(8, 8, 1)
    with torch.inference_mode():
        expected = load_model(found).eval()({"inputs": pixels_of(task, image)})
        torch.testing.assert_close(model(**processor(image, return_tensors="pt")).logits, expected, atol=1e-5, rtol=0)
