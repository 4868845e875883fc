"""Whether transformers computes with an exported folder what our model computes with the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.errors import CheckpointError, SetupError
from trainer.formats import Format

_TOLERANCE = 1e-4
"""Of logits in fp32, relative to the largest of them: deep models add up rounding of 1e-7 in every layer."""


def compare(model: torch.nn.Module, form: Format, folder: Path, dtype: torch.dtype, base: str | None = None) -> float:
    """The largest difference of logits on random inputs, relative to the largest logit; both models in fp32.

    model: ours, in fp32, with the weights of the checkpoint, which are rounded to `dtype` here as in the folder; base:
    the folder or name of the model whose adapters `folder` has, None = it has a whole model.
    Raises CheckpointError where the folder cannot be loaded or the logits differ, SetupError without transformers.
    """
    try:
        import transformers
    except ImportError as error:
        raise SetupError(
            "Comparing the export needs transformers; install shardwright[hf], or export with compare=false."
        ) from error
    transformers.utils.logging.disable_progress_bar()
    architecture = getattr(transformers, form.architecture)
    if base is None:
        theirs, told = architecture.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    else:
        theirs, told = _adapted(architecture, form, folder, base), {}
    if wrong := complaints(told, form):
        raise CheckpointError(f"{folder}: {form.architecture} loads it with {wrong}; nothing was exported.")
    for parameter in model.parameters():
        if base is None or parameter.requires_grad:
            parameter.data = parameter.data.to(dtype).float()
    batch, inputs = _random_batch(form)
    with torch.inference_mode():
        logits, expected = model.eval()(batch), theirs.eval()(**inputs).logits
    difference = float((logits - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE:
        raise CheckpointError(
            f"{folder}: the logits of {form.architecture} differ from the run's by {difference:.1e} of the largest;"
            " nothing was exported."
        )
    return difference


def _adapted(architecture: Any, form: Format, folder: Path, base: str) -> Any:
    """The base with the folder's adapters; what the base does not have (a head) is among these."""
    import peft

    config = architecture.config_class.from_dict(dict(form.config))
    whole = architecture.from_pretrained(base, config=config, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(whole, str(folder))


def complaints(told: Mapping[str, Any], form: Format) -> dict[str, list[str]]:
    """What transformers remarks on loading (its `output_loading_info`), but for tables it computes by itself."""
    left = {
        key: sorted(name for name in map(str, names) if not any(re.search(one, name) for one in form.ignored))
        for key, names in told.items()
    }
    return {key: names for key, names in left.items() if names}


def _random_batch(form: Format, rows: int = 2, length: int = 16) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The same ids, images or features of speech for our model and for theirs."""
    generator = torch.Generator().manual_seed(0)
    if "image_size" in form.config:
        size = form.config["image_size"]
        height, width = (size, size) if isinstance(size, int) else size
        images = torch.randn(rows, form.config["num_channels"], height, width, generator=generator)
        return {"inputs": images}, {"pixel_values": images}

    def ids() -> torch.Tensor:
        return torch.randint(form.config["vocab_size"], (rows, length), generator=generator)

    if not form.config.get("is_encoder_decoder"):
        one = ids()
        return {"input_ids": one}, {"input_ids": one}
    source, target = ids(), ids()
    if "num_mel_bins" in form.config:
        frames = 2 * form.config["max_source_positions"]
        features = torch.randn(rows, frames, form.config["num_mel_bins"], generator=generator)
        target = target[:, : form.config["max_target_positions"]]
        return (
            {"features": features, "decoder_input_ids": target},
            {"input_features": features.transpose(1, 2), "decoder_input_ids": target},
        )
    mask = torch.ones(rows, length, dtype=torch.bool)
    return (
        {"source_ids": source, "source_mask": mask, "decoder_input_ids": target},
        {"input_ids": source, "attention_mask": mask.long(), "decoder_input_ids": target},
    )
