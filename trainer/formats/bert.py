"""BERT (Devlin et al. 2019): `Encoder` with the head for masked tokens, for classes, or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.errors import ConfigError
from trainer.formats import Format, Tensor

MODEL_TYPES = ("bert",)

_ARCHITECTURES = {
    "masked_lm": "BertForMaskedLM",
    "classification": "BertForSequenceClassification",
    "none": "BertModel",
}


def obstacles(given: Mapping[str, Any]) -> list[str]:
    """None: see `trainer.formats`."""
    return []


def describe(given: Mapping[str, Any]) -> Format:
    """See `trainer.formats`. Heads that the model has not are not read, and one that the folder has not begins anew."""
    head = given["head"]
    told = {
        "model_type": "bert",
        "vocab_size": given["vocab_size"],
        "hidden_size": given["d_model"],
        "num_hidden_layers": given["num_layers"],
        "num_attention_heads": given["num_heads"],
        "intermediate_size": given["d_ff"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": given["dropout"],
        "attention_probs_dropout_prob": given["attention_dropout"],
        "max_position_embeddings": given["max_positions"],
        "type_vocab_size": given["token_types"],
        "initializer_range": given["init_std"],
        "layer_norm_eps": given["norm_eps"],
        "tie_word_embeddings": True,
    }
    if head == "classification":
        names = [f"LABEL_{index}" for index in range(given["num_classes"])]
        told |= {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    body, top = list(_body(given)), list(_top(head))
    twins = {f"{name}{old}": f"{name}{new}" for one in (*body, *top) for name, old, new in _old_names(one.theirs)}
    if head == "masked_lm":
        twins["cls.predictions.decoder.weight"] = "bert.embeddings.word_embeddings.weight"
        twins["cls.predictions.decoder.bias"] = "cls.predictions.bias"
    return Format(
        _ARCHITECTURES[head],
        told,
        [*body, *top],
        prefix="bert.",
        twins=twins,
        ignored=[r"^cls\.", r"^classifier\.", r"^(bert\.)?pooler\.", r"embeddings\.position_ids$"],
        fresh=[one.ours for one in top],
        between_ends=True,
    )


def _body(given: Mapping[str, Any]) -> Iterator[Tensor]:
    d_model = given["d_model"]
    yield Tensor("bert.embeddings.word_embeddings.weight", "embedding.weight")
    yield Tensor("bert.embeddings.position_embeddings.weight", "positions.weight")
    yield Tensor("bert.embeddings.token_type_embeddings.weight", "token_types.weight")
    yield from _both("bert.embeddings.LayerNorm", "embedding_norm")
    for index in range(given["num_layers"]):
        ours, theirs = f"layers.{index}", f"bert.encoder.layer.{index}"
        for place, name in enumerate(("query", "key", "value")):
            rows = place * d_model, (place + 1) * d_model
            yield from _both(f"{theirs}.attention.self.{name}", f"{ours}.attention.qkv", *rows)
        yield from _both(f"{theirs}.attention.output.dense", f"{ours}.attention.out")
        yield from _both(f"{theirs}.attention.output.LayerNorm", f"{ours}.attention_norm")
        yield from _both(f"{theirs}.intermediate.dense", f"{ours}.feed_forward.w_in")
        yield from _both(f"{theirs}.output.dense", f"{ours}.feed_forward.w_out")
        yield from _both(f"{theirs}.output.LayerNorm", f"{ours}.feed_forward_norm")


def _top(head: str) -> Iterator[Tensor]:
    if head == "masked_lm":
        yield Tensor("cls.predictions.bias", "embedding.head_bias")
        yield from _both("cls.predictions.transform.dense", "transform")
        yield from _both("cls.predictions.transform.LayerNorm", "transform_norm")
        return
    yield from _both("bert.pooler.dense", "pooler")
    if head == "classification":
        yield from _both("classifier", "classifier")


def _both(theirs: str, ours: str, begin: int = 0, end: int | None = None) -> Iterator[Tensor]:
    """Weight and bias."""
    for leaf in ("weight", "bias"):
        yield Tensor(f"{theirs}.{leaf}", f"{ours}.{leaf}", begin, end)


def _old_names(name: str) -> Iterator[tuple[str, str, str]]:
    """(stem, leaf in the first checkpoints, leaf now) of a norm's parameter."""
    stem, _, leaf = name.rpartition("LayerNorm.")
    if stem:
        yield f"{stem}LayerNorm.", {"weight": "gamma", "bias": "beta"}[leaf], leaf


def adopt(config: Mapping[str, Any]) -> dict[str, Any]:
    """See `trainer.formats`."""
    others = [f"{key}={config[key]}" for key in ("is_decoder", "add_cross_attention") if config.get(key)]
    if config.get("hidden_act", "gelu") != "gelu":
        others.append(f"hidden_act={config['hidden_act']}")
    if config.get("position_embedding_type", "absolute") != "absolute":
        others.append(f"position_embedding_type={config['position_embedding_type']}")
    if others:
        raise ConfigError(f"config.json: our Encoder has no {', '.join(others)}; train it with model=hf.")
    architecture = next(iter(config.get("architectures") or []), "BertForMaskedLM")
    heads = {name: head for head, name in _ARCHITECTURES.items()}
    head = heads.get(architecture, "none")
    return {
        "_target_": "trainer.models.encoder.Encoder",
        "vocab_size": config["vocab_size"],
        "d_model": config["hidden_size"],
        "num_heads": config["num_attention_heads"],
        "d_ff": config["intermediate_size"],
        "num_layers": config["num_hidden_layers"],
        "token_types": config.get("type_vocab_size", 2),
        "dropout": config.get("hidden_dropout_prob", 0.1),
        "attention_dropout": config.get("attention_probs_dropout_prob", 0.1),
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "init_std": config.get("initializer_range", 0.02),
        "head": head,
        # transformers writes the classes as names, and nothing where there are two
        "num_classes": len(config.get("id2label") or ("LABEL_0", "LABEL_1")) if head == "classification" else None,
        "max_positions": config.get("max_position_embeddings", 512),
    }
