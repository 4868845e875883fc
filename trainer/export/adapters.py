"""Adapters (LoRA, by peft) out of a checkpoint: merged into the weights that they were trained over, or by themselves,
as `peft.PeftModel.from_pretrained` loads them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from trainer.build import build
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.export.weights import Source
from trainer.formats import Format
from trainer.formats.hf import plain_name
from trainer.initial import frozen_values
from trainer.pretrained import Weights, first_weights

if TYPE_CHECKING:
    from trainer.restore import FoundRun

WEIGHTS = "adapter_model.safetensors"
_TASKS = {"seq2seq": "SEQ_2_SEQ_LM", "causal_lm": "CAUSAL_LM"}
"""What peft calls the kinds of models that write; its classes for others add modules of their own."""


def has_adapters(config: Config) -> bool:
    """Whether a run trains adapters over weights that stay as they were."""
    return config.model.get("lora") is not None


def without_adapters(part: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's model as it is when its adapters are merged."""
    return {**part, "lora": None} if part.get("lora") is not None else dict(part)


def base_of(config: Config) -> str:
    """The folder or name on the hub of the weights that the adapters belong to. Raises ConfigError where others cannot
    have these."""
    begun_with = config.init_from or (
        f"hf:{config.model['path']}" if config.model.get("pretrained", True) else "nothing"
    )
    kind, _, place = begun_with.partition(":")
    if kind != "hf":
        raise ConfigError(
            f"adapters=true: the adapters were trained over the weights of {begun_with}, which are in no folder of"
            " transformers; export them merged (adapters=false)."
        )
    folder = Path(place).expanduser()
    return str(folder.resolve()) if folder.is_dir() else place


def merged_source(found: FoundRun, reader: Source, form: Format) -> Source:
    """`reader`, with its adapters merged into what they were trained over, a parameter at a time.

    form: of the model without adapters. Raises ConfigError for adapters that are more than a product added to a matrix.
    """
    with torch.device("meta"):
        twin = build(found.config.model, "model")
    begun_with = first_weights(found.config, twin)
    if begun_with is None:
        raise ConfigError("model.pretrained=false: the weights under the adapters were random, and no one has them.")
    return _Merged(reader, begun_with, twin, {one.ours for one in form.tensors})


class _Merged:
    """See `Source`: the parameters by the names they have without adapters."""

    def __init__(self, reader: Source, begun_with: Weights, twin: torch.nn.Module, wanted: set[str]) -> None:
        self._reader, self._begun_with = reader, begun_with
        _fill(twin, reader)
        parameters = {name: one for name, one in twin.named_parameters() if ".lora_" not in name}
        self._names = {plain_name(name): name for name in parameters}
        layers = dict(twin.named_modules())
        self._added = {
            name: layers[name.removesuffix(".base_layer.weight")]
            for name in parameters
            if name.endswith(".base_layer.weight")
        }
        factors = [name for name, _ in twin.named_parameters() if ".lora_B." in name]
        if len(factors) != len(self._added) or set(self._names) != wanted:
            raise ConfigError("These adapters are not those of whole layers; export them with adapters=true.")
        self.shapes: dict[tuple[str, str], tuple[int, ...]] = {
            (plain, "master"): tuple(parameters[name].shape) for plain, name in self._names.items()
        }

    def read_into(self, parameter: str, state: str, start: int, target: torch.Tensor) -> None:
        """See `Source`."""
        name = self._names[parameter]
        if (name, state) in self._reader.shapes:
            self._reader.read_into(name, state, start, target)
        else:
            target.copy_(frozen_values(self._begun_with, name)[start : start + target.numel()])
        if name in self._added:
            added: torch.Tensor = self._added[name].get_delta_weight("default")
            target += added.detach().flatten()[start : start + target.numel()]


def _fill(twin: torch.nn.Module, reader: Source) -> dict[str, torch.Tensor]:
    """Give the adapters of a model on the meta device their storage and values; all that is trained, by name."""
    trained = {}
    for (name, state), shape in reader.shapes.items():
        if state != "master":
            continue
        trained[name] = torch.empty(shape)
        reader.read_into(name, state, 0, trained[name].view(-1))
        module_name, _, leaf = name.rpartition(".")
        module = twin.get_submodule(module_name)
        module._parameters[leaf] = torch.nn.Parameter(trained[name])
    return trained


def write_adapters(folder: Path, found: FoundRun, reader: Source, dtype: torch.dtype) -> list[Path]:
    """adapter_config.json and the file of weights, which is given back. Raises ConfigError: see `base_of`."""
    import peft

    base = base_of(found.config)
    with torch.device("meta"):
        twin = build(found.config.model, "model")
    trained = {name.removeprefix("model."): value.to(dtype) for name, value in _fill(twin, reader).items()}
    tensors = peft.get_peft_model_state_dict(twin.model, state_dict=trained, save_embedding_layers=False)
    if len(tensors) < len(trained):
        raise ConfigError("adapters=true: more is trained here than peft keeps with adapters; export them merged.")
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    described = copy.copy(twin.model.peft_config["default"])
    described.base_model_name_or_path, described.inference_mode = base, True
    described.task_type = described.task_type or _TASKS.get(twin.kind)
    described.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=1) + "\n", encoding="utf-8")
    return [folder / WEIGHTS]
