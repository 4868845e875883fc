"""How transformers makes an image into what a model takes, for a task of ours."""

from __future__ import annotations

from typing import Any

from trainer.tasks.image_classification import ImageClassification

_BILINEAR = 2
"""Pillow's number of the way in which the task resizes."""


def image_processor(task: ImageClassification) -> dict[str, Any] | None:
    """preprocessor_config.json of an image processor that gives the pixels of the task; None where transformers has
    none: its crops cover squares alone. A grey model's wants grey images."""
    size = {"height": task.height, "width": task.width}
    values = {"image_mean": task.mean, "image_std": task.std}
    told: dict[str, Any] = {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": task.channels == 3,
        "do_resize": True,
        "size": size,
        "resample": _BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        **{name: value * task.channels if len(value) == 1 else value for name, value in values.items()},
    }
    if task.fit == "stretch":
        return told
    if task.height != task.width:
        return None
    crop = {"size": {"shortest_edge": task.height}, "do_center_crop": True, "crop_size": size}
    return {**told, "image_processor_type": "CLIPImageProcessor", **crop}
