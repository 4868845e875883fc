"""A model of transformers (`HFModel`): its tensors have the names that it gives them, adapters left aside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from trainer.formats import PROCESSOR, Format, Tensor, whisper
from trainer.models.hf import HFModel

MODEL_TYPES = ()
_HEADS = r"^(cls|lm_head|qa_outputs|classifier|pre_classifier|score)\."
"""Where other heads than a classifier's have their tensors."""
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save\.default)(?=\.)")
"""What peft adds to names."""


def obstacles(given: Mapping[str, Any]) -> list[str]:
    """None: see `trainer.formats`."""
    return []


def describe(given: Mapping[str, Any]) -> Format:
    """See `trainer.formats`."""
    with torch.device("meta"):
        model = HFModel(**given)
    theirs = model.theirs
    classifies = model.kind.endswith("classification")
    tensors = [Tensor(their_name(name), name) for name, _ in model.named_parameters() if ".lora_" not in name]
    prefix = f"{theirs.base_model_prefix}." if theirs.base_model_prefix else ""
    buffers = [rf"{re.escape(name)}$" for name, _ in theirs.named_buffers()]
    config = theirs.config.to_dict()
    files = {}
    if config["model_type"] in whisper.MODEL_TYPES:
        files[PROCESSOR] = whisper.extractor(config["num_mel_bins"], config["max_source_positions"])
    return Format(
        type(theirs).__name__,
        {**config, "architectures": [type(theirs).__name__]},  # the folder may be of the bare model
        tensors,
        prefix,
        twins={name: same for name, same in theirs.all_tied_weights_keys.items() if name != same},
        ignored=[*buffers, *(theirs._keys_to_ignore_on_load_unexpected or ()), *([_HEADS] if classifies else ())],
        fresh=[one.ours for one in tensors if classifies and not one.theirs.startswith(prefix)],
        files=files,
    )


def their_name(name: str) -> str:
    """What transformers calls a parameter of `HFModel`."""
    return plain_name(name).removeprefix("model.")


def plain_name(name: str) -> str:
    """What a parameter of an `HFModel` is called in one without adapters."""
    return _WRAPPED.sub("", name.replace("model.base_model.model.", "model.", 1))
