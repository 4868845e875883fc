"""The presets of Whisper: what the public config.json says, and transformers' own number of parameters."""

from __future__ import annotations

import pytest
import torch

from trainer.build import build
from trainer.composition import compose, config_directory
from trainer.formats.catalogue import format_of

transformers = pytest.importorskip("transformers")


def whisper(d_model: int, heads: int, layers: int, decoder_layers: int | None = None, **more: int) -> dict[str, int]:
    sides = {"encoder": layers, "decoder": layers if decoder_layers is None else decoder_layers}
    shape = {f"{side}_layers": number for side, number in sides.items()}
    shape |= {f"{side}_attention_heads": heads for side in sides} | {f"{side}_ffn_dim": 4 * d_model for side in sides}
    return {"vocab_size": 51_865, "num_mel_bins": 80, "d_model": d_model, **shape, **more}


V3 = {"vocab_size": 51_866, "num_mel_bins": 128}
PUBLIC = {
    "whisper_tiny": whisper(384, 6, 4),
    "whisper_base": whisper(512, 8, 6),
    "whisper_small": whisper(768, 12, 12),
    "whisper_medium": whisper(1024, 16, 24),
    "whisper_large": whisper(1280, 20, 32),
    "whisper_large_v3": whisper(1280, 20, 32, **V3),
    "whisper_large_v3_turbo": whisper(1280, 20, 32, 4, **V3),
}
"""The numbers of each config.json that say what the model is."""


@pytest.mark.parametrize("preset", PUBLIC)
def test_a_preset_is_the_public_model_and_has_transformers_own_number_of_parameters(preset: str) -> None:
    """Those that are trained: theirs has the encoder's sines and cosines as a parameter that is not."""
    words = [f"model={preset}", "task=speech_recognition", "name=x", "steps=1", "batch.global_size=1"]
    part = compose([*words, "tokenizer.vocab_size=512"])["model"]
    config = transformers.WhisperConfig(**PUBLIC[preset])
    described = format_of(part, None).config
    assert {key: described[key] for key in PUBLIC[preset]} == PUBLIC[preset]
    assert (described["max_source_positions"], described["max_target_positions"]) == (1500, 448)
    with torch.device("meta"):
        ours = build(part, "model")
        theirs = transformers.WhisperForConditionalGeneration(config)
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == sum(parameter.numel() for parameter in theirs.parameters() if parameter.requires_grad)
    first_line = (config_directory() / "model" / f"{preset}.yaml").read_text().splitlines()[0]
    assert f" {count:,} parameters" in first_line


def test_there_is_a_preset_of_every_size() -> None:
    assert {path.stem for path in (config_directory() / "model").glob("whisper_*.yaml")} == set(PUBLIC)
