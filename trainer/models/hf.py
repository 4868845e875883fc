"""Any model of transformers, by name or folder, with LoRA (Hu et al. 2021) by peft if asked for."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError, SetupError
from trainer.models.base import Model

Kind = Literal["seq2seq", "causal_lm", "masked_lm", "sequence_classification", "image_classification", "speech_seq2seq"]

_AUTO: dict[str, str] = {
    "seq2seq": "AutoModelForSeq2SeqLM",
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
    "speech_seq2seq": "AutoModelForSpeechSeq2Seq",
}

_INPUTS: dict[str, dict[str, str]] = {
    "seq2seq": {
        "source_ids": "input_ids",
        "source_mask": "attention_mask",
        "decoder_input_ids": "decoder_input_ids",
    },
    "causal_lm": {"input_ids": "input_ids", "attention_mask": "attention_mask"},
    "masked_lm": {"input_ids": "input_ids", "attention_mask": "attention_mask", "token_type_ids": "token_type_ids"},
    "sequence_classification": {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "token_type_ids": "token_type_ids",
    },
    "image_classification": {"inputs": "pixel_values"},
    "speech_seq2seq": {"features": "input_features", "decoder_input_ids": "decoder_input_ids"},
}
"""What the fields of our batches are called in their `forward`."""

_ADAPTER = re.compile(r"\.lora_(\w+)")


@dataclass
class HFState:
    """`DecoderState` over a cache of transformers. inputs: what every step is given besides."""

    cache: Any
    inputs: dict[str, Any]
    first_ids: Tensor | None = None

    def select(self, row_indices: Tensor) -> HFState:
        """See `DecoderState.select`."""
        cache = copy.deepcopy(self.cache)
        if cache.get_seq_length() > 0:
            cache.batch_select_indices(row_indices)
        inputs = {name: _rows(value, row_indices) for name, value in self.inputs.items()}
        return HFState(cache, inputs, None if self.first_ids is None else self.first_ids[row_indices])


class HFModel(Model):
    """A model of transformers behind our contract.

    path: a folder or a name on the hub, for its configuration; kind: which of transformers' Auto classes; config:
    what to have otherwise than in its configuration (num_labels, dropout ...). pretrained: whether the weights come
    from `path`, too, unless `init_from` names others. lora: None trains all parameters; a mapping of peft's LoraConfig
    (r, lora_alpha, lora_dropout, target_modules, modules_to_save ...) freezes them and trains adapters, and only these
    are in checkpoints. Code that comes with a checkpoint is never run.
    """

    def __init__(
        self,
        path: str,
        kind: Kind,
        config: Mapping[str, Any] | None = None,
        pretrained: bool = True,
        lora: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises ConfigError for a path without such a model, SetupError without transformers or peft."""
        super().__init__()
        if kind not in _AUTO:
            raise ConfigError(f"model.kind={kind} is not known; choose one of {', '.join(_AUTO)}.")
        self.kind = kind
        self.init_from = f"hf:{path}" if pretrained else None
        theirs = _build(path, kind, dict(config or {}))
        self.config: Any = theirs.config
        self.vocab_size: int | None = getattr(self.config.get_text_config(), "vocab_size", None)
        self.max_positions = _learned_positions(theirs)
        if kind == "speech_seq2seq":
            self.num_mels: int = self.config.num_mel_bins
        self.model: Any = theirs if lora is None else _with_adapters(theirs, dict(lora))

    @property
    def theirs(self) -> Any:
        """The model of transformers, without the wrapper of adapters."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The fields that `kind` takes -> logits: [B,T,V] of text, [B,C] of classes."""
        inputs = {theirs: batch[ours] for ours, theirs in _INPUTS[self.kind].items() if ours in batch}
        if "input_features" in inputs:  # [B, frames, mels] here
            inputs["input_features"] = inputs["input_features"].transpose(1, 2)
        more = {"use_cache": False} if self.kind in ("seq2seq", "causal_lm", "speech_seq2seq") else {}
        logits: Tensor = self.model(**inputs, **more, return_dict=True).logits
        return logits

    def reset_parameter(self, name: str, generator: torch.Generator) -> None:
        """Fill one parameter as transformers (or peft) does for its module."""
        module_name, _, leaf = name.rpartition(".")
        parameter = self.get_submodule(module_name)._parameters[leaf]
        assert parameter is not None
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            elif ".lora_B." in name:
                parameter.zero_()
            else:
                parameter.fill_(torch.nan)
                while bool(parameter.isnan().any()) and module_name:
                    self.theirs._init_weights(self.get_submodule(module_name))
                    module_name = module_name.rpartition(".")[0]
                assert not bool(parameter.isnan().any()), f"transformers does not say how {name} begins"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HFModel:
        """Casts parameters, and leaves floating-point tables (rotary frequencies) in their precision."""
        tables = {name: table for name, table in self.named_buffers() if table.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, table in tables.items():
            module_name, _, leaf = name.rpartition(".")
            module = self.get_submodule(module_name)
            moved = module._buffers[leaf]
            module._buffers[leaf] = table.to(moved.device) if moved is not None else None
        return self

    def flops_per_sample(self, **lengths: int) -> float:
        """Forward and backward: 6 x parameters of linear maps x positions (Kaplan et al. 2020), without attention."""
        whole, encoder = _matrices(self.theirs), 0
        if self.kind in ("seq2seq", "speech_seq2seq"):
            encoder = _matrices(self.theirs.get_encoder())
        target = lengths.get("target_length", 1)
        return 6.0 * (encoder * lengths.get("source_length", 0) + (whole - encoder) * target)

    def start_decoding(self, batch: Mapping[str, Tensor]) -> HFState:
        """See the contract: runs the encoder, or the prompt but for its last token."""
        from transformers import DynamicCache, EncoderDecoderCache

        if self.kind in ("seq2seq", "speech_seq2seq"):
            names = {ours: theirs for ours, theirs in _INPUTS[self.kind].items() if ours != "decoder_input_ids"}
            inputs = {theirs: batch[ours] for ours, theirs in names.items() if ours in batch}
            if "input_features" in inputs:
                inputs["input_features"] = inputs["input_features"].transpose(1, 2)
            inputs["encoder_outputs"] = self.theirs.get_encoder()(**inputs, return_dict=True)
            for name in ("input_ids", "input_features"):
                inputs.pop(name, None)
            return HFState(EncoderDecoderCache(DynamicCache(), DynamicCache()), inputs)
        ids, mask = batch["input_ids"], batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        order = mask.long().argsort(dim=1, stable=True)  # padding to the left
        ids, mask = ids.gather(1, order), mask.gather(1, order).long()
        state = HFState(DynamicCache(), {"attention_mask": mask[:, :-1]}, ids[:, -1])
        if ids.shape[1] > 1:
            self._extend(state, ids[:, :-1])
        return state

    def decode_step(self, state: HFState, token_ids: Tensor) -> Tensor:
        """token_ids [R] at the next position -> logits [R,V] of the one after it."""
        if state.first_ids is None:
            outputs = self.model(
                **state.inputs, decoder_input_ids=token_ids[:, None], past_key_values=state.cache, use_cache=True
            )
            logits: Tensor = outputs.logits[:, -1]
            return logits
        mask = state.inputs["attention_mask"]
        state.inputs["attention_mask"] = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        return self._extend(state, token_ids[:, None])[:, -1]

    def _extend(self, state: HFState, ids: Tensor) -> Tensor:
        mask = state.inputs["attention_mask"]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits: Tensor = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=state.cache,
            use_cache=True,
        ).logits
        return logits


def _build(path: str, kind: str, config: dict[str, Any]) -> Any:
    try:
        import transformers
        from transformers.initialization import no_init_weights
    except ImportError as error:
        raise SetupError("model=hf needs transformers; install shardwright[hf].") from error
    try:
        described = transformers.AutoConfig.from_pretrained(path, **config)
        auto = getattr(transformers, _AUTO[kind])
        with no_init_weights():
            model = auto.from_config(described)
        model.tie_weights()
        return model
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={path}, model.kind={kind}: {str(error).strip().splitlines()[0]}") from error


def _with_adapters(theirs: Any, lora: dict[str, Any]) -> Any:
    try:
        import peft
    except ImportError as error:
        raise SetupError("model.lora needs peft; install shardwright[hf].") from error
    if lora.get("init_lora_weights", True) is not True:
        raise ConfigError(
            f"model.lora.init_lora_weights={lora['init_lora_weights']}: adapters begin as peft's usual ones here; leave"
            " it out."
        )
    try:
        adapted = peft.get_peft_model(theirs, peft.LoraConfig(**lora))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.lora={lora}: {error}") from error
    others = sorted({part for name, _ in adapted.named_parameters() for part in _ADAPTER.findall(name)} - {"A", "B"})
    if others:
        raise ConfigError(f"model.lora={lora}: lora_{others[0]} is not known here; plain LoRA of linear layers is.")
    for module in adapted.modules():
        if isinstance(module, peft.utils.ModulesToSaveWrapper):
            module.original_module = nn.Identity()  # the copy that is trained stands for it; a new head has no other
    return adapted


def _learned_positions(theirs: Any) -> int | None:
    """The longest sequence, where positions come from a table of parameters."""
    tables = ("embed_positions.weight", "position_embeddings.weight", "wpe.weight")
    sizes = [len(parameter) for name, parameter in theirs.named_parameters() if name.endswith(tables)]
    limit = getattr(theirs.config, "max_position_embeddings", None)
    return min([*sizes, limit] if limit else sizes) if sizes else None


def _matrices(module: nn.Module) -> int:
    return sum(one.in_features * one.out_features for one in module.modules() if isinstance(one, nn.Linear))


def _rows(value: Any, row_indices: Tensor) -> Any:
    """Rows of a tensor, or of all tensors in one of transformers' outputs."""
    if isinstance(value, Tensor):
        return value[row_indices]
    return type(value)(**{name: _rows(one, row_indices) for name, one in value.items()})
