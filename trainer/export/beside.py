"""What an exported folder has beside the weights: config.json, the tokenizer, how text is generated, and the card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.data.tokenizer import Tokenizer
from trainer.formats import PROCESSOR, Format
from trainer.formats.images import image_processor
from trainer.tasks import Chats
from trainer.tasks.chat_template import response_template
from trainer.tasks.image_classification import ImageClassification
from trainer.tasks.text import start_id

if TYPE_CHECKING:
    from trainer.restore import FoundRun

_PROMPT = (r"<\|startoftranscript\|>", r"<\|[a-z]{2,3}\|>", r"<\|(transcribe|translate)\|>", r"<\|notimestamps\|>")


def write_beside(folder: Path, found: FoundRun, form: Format, dtype: str, base: str | None = None) -> None:
    """Write all of it. dtype: of the weights, as torch calls it; base: what the folder's adapters belong to, which has
    its own configuration; None = they are whole weights."""
    from trainer.parts import make_task

    special = _special_tokens(found, form)
    task: Any = make_task(found.config, found.tokenizer)
    if base is None:
        _write_json(folder / "config.json", {**form.config, **special, **_classes(task), "dtype": dtype})
    if found.tokenizer is not None:
        chat_template = None
        if isinstance(task, Chats):
            chat_template = task.chat_template
            special["eos_token_id"] = sorted({special["eos_token_id"], task.end_id})
        _write_tokenizer(folder, found.tokenizer, form, chat_template)
        if base is None:
            _write_json(folder / "generation_config.json", {**special, **_generation(found, form)})
    if isinstance(task, ImageClassification) and (processor := image_processor(task)) is not None:
        _write_json(folder / PROCESSOR, processor)
    for name, value in form.files.items():
        _write_json(folder / name, value)
    (folder / "README.md").write_text(_card(found, form, base), encoding="utf-8")


def _classes(task: Any) -> dict[str, Any]:
    """Their names, where the task has some."""
    names = getattr(task, "class_names", None)
    if names is None:
        return {}
    numbers = {name: number for number, name in enumerate(names)}
    return {"id2label": {str(number): name for name, number in numbers.items()}, "label2id": numbers}


def _special_tokens(found: FoundRun, form: Format) -> dict[str, Any]:
    special = {key: value for key, value in form.config.items() if key.endswith("_token_id")}
    if found.tokenizer is not None and form.config.get("is_encoder_decoder"):
        prompt = found.config.task.get("prompt") or [found.config.task.get("start_token")]
        special["decoder_start_token_id"] = start_id(found.tokenizer, prompt[0])
    return special


def _generation(found: FoundRun, form: Format) -> dict[str, Any]:
    """What the task says of its beam search, in transformers' words; padding is never written, as here.

    The lengths of encoder-decoders count the token that a target begins with, but for Whisper's. With early_stopping
    "never" the search ends when nothing open can win, as ours. The length penalty is that of length_penalty_kind=power
    (`other_penalty`).
    """
    if not form.config.get("is_encoder_decoder") or found.tokenizer is None:
        return {}
    task, pad = found.config.task, found.tokenizer.pad_id
    told: dict[str, Any] = {"do_sample": False}
    if "max_target_length" in task:
        told["max_length"] = task["max_target_length"] + (form.config.get("model_type") != "whisper")
    told |= _whisper_prompt(task.get("prompt") or (), found.tokenizer)
    if "beam_size" in task:
        told["num_beams"] = task["beam_size"]
        if task["beam_size"] > 1:
            told["early_stopping"] = "never"
    if "length_penalty" in task and task.get("beam_size", 1) > 1:
        told["length_penalty"] = task["length_penalty"]
    return told if pad == found.tokenizer.eos_id else {**told, "suppress_tokens": [pad]}


def _whisper_prompt(prompt: Sequence[str], tokenizer: Tokenizer) -> dict[str, Any]:
    """What Whisper's `generate` makes the prompt of; nothing where it is not begin, language, task, no timestamps."""
    if len(prompt) != len(_PROMPT) or not all(map(re.fullmatch, _PROMPT, prompt)):
        return {}
    _, language, task, no_timestamps = prompt
    name = task.strip("<|>")
    return {
        "is_multilingual": True,
        "language": language,
        "lang_to_id": {language: tokenizer.id_of(language)},
        "task": name,
        "task_to_id": {name: tokenizer.id_of(task)},
        "no_timestamps_token_id": tokenizer.id_of(no_timestamps),
        "return_timestamps": False,
    }


def other_penalty(task: Mapping[str, Any]) -> str:
    """What is to be said where transformers ranks the hypotheses of a task's beams otherwise; "" where it does not."""
    alpha = task.get("length_penalty", 0.0)
    if not alpha or task.get("beam_size", 1) == 1 or task.get("length_penalty_kind") == "power":
        return ""
    return (
        f"transformers divides log P(Y) by |Y|^{alpha:g}, the run by ((5 + |Y|) / 6)^{alpha:g}, so texts may differ"
        " (task.length_penalty_kind=power is the same in both)"
    )


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, form: Format, chat_template: str | None) -> None:
    """tokenizer.json as the run has it, and what transformers wants to know besides.

    The end token follows each text of an encoder-decoder, as its tasks have it; an encoder's stand between two ends.
    """
    written = tokenizer.between_ends().source_json if form.between_ends else tokenizer.source_json
    (folder / "tokenizer.json").write_text(written, encoding="utf-8", newline="")
    tokens = {"pad_token": tokenizer.pad_id, "bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    if form.between_ends:
        tokens |= {"cls_token": tokenizer.bos_id, "sep_token": tokenizer.eos_id}
    if tokenizer.mask_id is not None:
        tokens["mask_token"] = tokenizer.mask_id
    named = {name: tokenizer.token_of(id_) for name, id_ in tokens.items()}
    if form.config.get("is_encoder_decoder"):
        ending = {"post_processor": _ending(named["eos_token"], tokenizer.eos_id)}
        _write_json(folder / "tokenizer.json", {**json.loads(written), **ending})
    more: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if chat_template is not None:
        more["chat_template"] = chat_template
        if (answers := response_template(chat_template, named["eos_token"])) is not None:
            more["response_template"] = answers
    _write_json(folder / "tokenizer_config.json", {**more, **named})


def _ending(name: str, id_: int) -> dict[str, Any]:
    """The post-processor of the library `tokenizers` that writes the end token after a text, or after each of two."""
    texts = [{"Sequence": {"id": text, "type_id": 0}} for text in "AB"]
    end = {"SpecialToken": {"id": name, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [texts[0], end],
        "pair": [texts[0], end, texts[1], end],
        "special_tokens": {name: {"id": name, "ids": [id_], "tokens": [name]}},
    }


def _card(found: FoundRun, form: Format, base: str | None) -> str:
    """The model card: where the weights come from, what they were trained on, and how well they did."""
    config, state = found.config, found.checkpoint.state
    library = "transformers" if base is None else f"peft\nbase_model: {base}"
    parts = [
        f"---\nlibrary_name: {library}\n---\n\n# {config.name}\n\n"
        f"{form.architecture}, trained by Shardwright for {state.step:,} steps on {state.tokens:,} target tokens"
        f" (task {config.task['_target_'].rpartition('.')[2]}, seed {config.seed})."
    ]
    if found.said:
        parts.append(f"Weights: {found.said}.")
    if config.init_from is not None:
        parts.append(f"The first weights were those of {config.init_from}.")
    if base is None and form.config.get("is_encoder_decoder") and (told := other_penalty(config.task)):
        parts.append(f"Beam search: {told}.")
    parts.append("## Data\n\n" + "\n".join(f"* {line}" for line in _data(config.data)))
    if found.directory.evaluation.is_file():
        parts.append(_scores(json.loads(found.directory.evaluation.read_text(encoding="utf-8"))))
    return "\n\n".join(parts) + "\n"


def _data(data: Mapping[str, Any]) -> list[str]:
    sources = data.get("sources") or {"": data}
    return [
        " ".join(str(part) for part in (f"{name}:" if name else "", given.get("path"), given.get("name")) if part)
        for name, given in sources.items()
    ]


def _scores(evaluation: Mapping[str, Any]) -> str:
    rows = [
        f"| {name.removeprefix('eval/')} | {f'{value:.4g}' if isinstance(value, float) else value} |"
        for name, value in evaluation.items()
        if name not in ("step", "split")
    ]
    title = f"## Evaluation\n\nOf the {evaluation['split']} split, after step {evaluation['step']:,}.\n\n"
    return title + "\n".join(["| metric | value |", "|---|---|", *rows])


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
