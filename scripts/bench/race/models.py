"""The laps' shapes as transformers builds them, for entrants whose users take models from there: Marian's
encoder-decoder, Llama's decoder."""

from __future__ import annotations

from typing import Any

import torch


def build(spec: dict[str, Any]) -> torch.nn.Module:
    """A fresh model of the lap's shape, with transformers' own first weights; Marian's as wide as ours, because the
    usual 0.02 is for d 512: at d 128 it learns nothing for 250 steps."""
    import transformers

    transformers.set_seed(spec["seed"])
    shape, ids = spec["model"], spec["ids"]
    common = {
        "vocab_size": spec["vocab_size"],
        "pad_token_id": ids["pad"],
        "eos_token_id": ids["eos"],
        "tie_word_embeddings": True,
        "max_position_embeddings": spec["max_length"],
        "use_cache": False,
    }
    model: torch.nn.Module
    if spec["kind"] == "packed":
        config = transformers.LlamaConfig(
            **common,
            bos_token_id=ids["bos"],
            hidden_size=shape["d_model"],
            intermediate_size=shape["d_ff"],
            num_hidden_layers=shape["num_layers"],
            num_attention_heads=shape["num_heads"],
            rms_norm_eps=1e-5,
        )
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    else:
        marian = transformers.MarianConfig(
            **common,
            d_model=shape["d_model"],
            **{f"{side}_layers": shape[f"{side}_layers"] for side in ("encoder", "decoder")},
            **{f"{side}_attention_heads": shape["num_heads"] for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": shape["d_ff"] for side in ("encoder", "decoder")},
            dropout=shape["dropout"],
            attention_dropout=0.0,
            activation_dropout=0.0,
            activation_function="swish",
            scale_embedding=True,
            init_std=shape["d_model"] ** -0.5,
            decoder_start_token_id=ids["bos"],
            forced_eos_token_id=None,
        )
        model = transformers.MarianMTModel._from_config(marian, attn_implementation="sdpa")
    return model


def count(model: torch.nn.Module) -> int:
    """Trained parameters, each once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def tokenizer(spec: dict[str, Any]) -> Any:
    """The lap's tokenizer as transformers wraps one."""
    from transformers import PreTrainedTokenizerFast

    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_file=spec["tokenizer"], **names)


def translate(spec: dict[str, Any], model: Any) -> None:
    """What `model` writes for each line of the input, batches of 64 texts of similar length."""
    from pathlib import Path

    from common import batches_by_length

    told = spec["translate"]
    texts = Path(told["input"]).read_text(encoding="utf-8").splitlines()
    wrapped, eos = tokenizer(spec), spec["ids"]["eos"]
    outputs = [""] * len(texts)
    model.eval()
    for places in batches_by_length(texts, 64):
        rows = [[*wrapped(texts[place], add_special_tokens=False)["input_ids"], eos] for place in places]
        batch = wrapped.pad({"input_ids": rows}, return_tensors="pt")
        limit = min(2 * batch["input_ids"].shape[1], spec["max_length"] - 1)
        with torch.inference_mode():
            written = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                num_beams=told["beams"],
                max_new_tokens=limit,
                do_sample=False,
                use_cache=True,
            )
        for place, text in zip(places, wrapped.batch_decode(written, skip_special_tokens=True), strict=True):
            outputs[place] = " ".join(text.splitlines())
    Path(told["output"]).write_text("".join(f"{text}\n" for text in outputs), encoding="utf-8")
