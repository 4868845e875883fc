"""The counterpart of a model: of ours in transformers, and of theirs here."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

from trainer.data.tokenizer import Tokenizer
from trainer.errors import ConfigError
from trainer.formats import Format, gpt2, llama, qwen, t5
from trainer.models.decoder import Decoder
from trainer.models.encoder_decoder import EncoderDecoder
from trainer.models.scaling import as_decoder

_FAMILIES: dict[type, tuple[ModuleType, ...]] = {Decoder: (llama, qwen, gpt2), EncoderDecoder: (t5,)}
"""For each model of ours, the families that it can be, the usual ones first."""


def format_of(part: Mapping[str, Any], tokenizer: Tokenizer | None) -> Format:
    """The counterpart of the model that the configuration's `part` describes.

    Raises ConfigError where there is none, with what stands in the way of the nearest.
    """
    part = as_decoder(part)
    known = {model.__name__: model for model in _FAMILIES}
    name = part["_target_"].rpartition(".")[2]
    if name not in known:
        raise ConfigError(
            f"model._target_={part['_target_']} has no counterpart in transformers; those that have one are"
            f" {', '.join(known)}."
        )
    bound = inspect.signature(known[name]).bind(**{key: value for key, value in part.items() if key != "_target_"})
    bound.apply_defaults()
    obstacles = {family: family.obstacles(bound.arguments) for family in _FAMILIES[known[name]]}
    nearest = min(obstacles, key=lambda family: len(obstacles[family]))
    if obstacles[nearest]:
        raise ConfigError(
            f"This {name} has no counterpart in transformers, of which {_title(nearest)} is the nearest:"
            f" {', '.join(obstacles[nearest])}."
        )
    form: Format = nearest.describe(bound.arguments)
    return replace(form, config={"architectures": [form.architecture], **form.config, **_special_tokens(tokenizer)})


def part_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's model part for a config.json of transformers.

    Raises ConfigError for a `model_type` that no model of ours is the counterpart of, listing the known, and for
    options that ours does not have.
    """
    families = {kind: family for each in _FAMILIES.values() for family in each for kind in family.MODEL_TYPES}
    kind = config.get("model_type")
    if kind not in families:
        raise ConfigError(
            f"config.json: model_type={kind!r} is none that a model of ours is the counterpart of; known are"
            f" {', '.join(sorted(families))}. Any other trains as it is with model=hf."
        )
    adopted: dict[str, Any] = families[kind].adopt(config)
    return adopted


def _title(family: ModuleType) -> str:
    return str(family.__doc__).partition(" (")[0]


def _special_tokens(tokenizer: Tokenizer | None) -> dict[str, int]:
    if tokenizer is None:
        return {}
    ids = {"pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return {**ids, "decoder_start_token_id": tokenizer.bos_id}
