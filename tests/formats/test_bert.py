"""BERT's logits, on random shapes and weights, both ways; bare, old and real folders."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from tests.formats.parity import assert_close, both_ways, ids_of, ours_of, scattered, theirs_of  # noqa: E402
from trainer.errors import CheckpointError, ConfigError  # noqa: E402
from trainer.formats.catalogue import format_of, part_of  # noqa: E402
from trainer.pretrained import open_weights  # noqa: E402


def config_of(**changes):
    shape = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    return transformers.BertConfig(**{**shape, "num_attention_heads": 4, "max_position_embeddings": 40, **changes})


def inputs_of(length, seed=0):
    """The same padded ids of two texts for our model and for theirs."""
    ids = ids_of(61, length, seed)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, length // 2 + 1 :] = False
    types = (torch.arange(length) > length // 3).long().expand(2, length).contiguous()
    ours = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return ours, {**ours, "attention_mask": mask.long()}


@settings(max_examples=8)
@given(
    heads=st.sampled_from([1, 3, 4]),
    layers=st.integers(1, 3),
    types=st.integers(2, 3),
    eps=st.sampled_from([1e-12, 1e-5]),
    length=st.integers(1, 40),
)
def test_logits_of_masked_tokens(heads, layers, types, eps, length):
    config = config_of(num_attention_heads=heads, num_hidden_layers=layers, type_vocab_size=types, layer_norm_eps=eps)
    both_ways(scattered(transformers.BertForMaskedLM(config)), *inputs_of(length))


@settings(max_examples=6)
@given(classes=st.integers(2, 9), layers=st.integers(1, 3), length=st.integers(1, 40))
def test_logits_of_classes(classes, layers, length):
    config = config_of(num_labels=classes, num_hidden_layers=layers)
    both_ways(scattered(transformers.BertForSequenceClassification(config)), *inputs_of(length))


def test_vectors_of_a_bare_model(tmp_path):
    theirs = scattered(transformers.BertModel(config_of()))
    batch, inputs = inputs_of(20)
    with torch.inference_mode():
        expected = theirs(**inputs)
        ours = ours_of(theirs, tmp_path / "theirs")
        hidden = ours(batch)
        assert_close(hidden, expected.last_hidden_state)
        assert_close(ours.pool(hidden), expected.pooler_output)
        assert_close(theirs_of(ours, tmp_path / "ours")(**inputs).pooler_output, expected.pooler_output)


def part_with_head(folder, head, num_classes=None):
    part = part_of(json.loads((folder / "config.json").read_text()))
    return {**part, "head": head, "num_classes": num_classes}


def weights_of(folder, part):
    from trainer.build import build

    model = build(part, "model")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    weights = open_weights(f"hf:{folder}", "runs", part, shapes)
    return {name: weights.values(name) for name in shapes}


@pytest.mark.parametrize(
    "source", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForPreTraining"]
)
@pytest.mark.parametrize(("head", "num_classes"), [("masked_lm", None), ("classification", 3), ("none", None)])
def test_every_head_begins_from_every_kind_of_folder(tmp_path, source, head, num_classes):
    """What the folder has is read, what it has not begins anew, and what the model has no use for is left."""
    theirs = scattered(getattr(transformers, source)(config_of(num_labels=3)))
    theirs.save_pretrained(tmp_path)
    values = weights_of(tmp_path, part_with_head(tmp_path, head, num_classes))
    body = {name: value for name, value in values.items() if name.startswith(("embedding", "layers", "positions"))}
    assert all(value is not None for name, value in body.items() if name != "embedding.head_bias")
    bert = theirs if source == "BertModel" else theirs.bert
    assert torch.equal(body["embedding.weight"], bert.embeddings.word_embeddings.weight.detach().flatten())
    has = {"pooler": source != "BertForMaskedLM", "classifier": source == "BertForSequenceClassification"}
    has |= {"transform": source in ("BertForMaskedLM", "BertForPreTraining")}
    for part, there in has.items():
        if f"{part}.weight" in values:
            assert (values[f"{part}.weight"] is not None) == there


def test_the_first_checkpoints_called_norms_by_other_names(tmp_path):
    theirs = scattered(transformers.BertForMaskedLM(config_of()))
    theirs.save_pretrained(tmp_path)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(tmp_path / "model.safetensors")
    for now, then in old.items():
        tensors = {name.replace(now, then): value for name, value in tensors.items()}
    tensors["bert.embeddings.position_ids"] = torch.arange(40)[None]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    values = weights_of(tmp_path, part_with_head(tmp_path, "masked_lm"))
    norm = theirs.bert.encoder.layer[1].output.LayerNorm
    assert torch.equal(values["layers.1.feed_forward_norm.bias"], norm.bias.detach())


def test_what_is_missing_or_too_much_is_listed(tmp_path):
    transformers.BertModel(config_of()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["embeddings.extra"] = tensors.pop("encoder.layer.1.output.dense.bias")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layer.1.output.dense.bias is missing.*embeddings.extra has no place"):
        weights_of(tmp_path, part_with_head(tmp_path, "none"))


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_act", "relu"), ("is_decoder", True), ("position_embedding_type", "relative_key")]
)
def test_what_the_encoder_has_not_is_refused(key, value):
    with pytest.raises(ConfigError, match=f"our Encoder has no {key}={value}"):
        part_of({**config_of().to_dict(), key: value})


SHAPES = {
    "bert_tiny": (128, 2, 2, 512),
    "bert_mini": (256, 4, 4, 1024),
    "bert_small": (512, 4, 8, 2048),
    "bert_base": (768, 12, 12, 3072),
    "bert_large": (1024, 24, 16, 4096),
    "minilm": (384, 6, 12, 1536),
}
"""d_model, layers, heads, d_ff."""


@pytest.mark.parametrize("preset", SHAPES)
@pytest.mark.parametrize("head", ["masked_lm", "classification"])
def test_presets_have_the_parameters_of_transformers(preset, head):
    from trainer.build import build
    from trainer.composition import compose
    from trainer.config import to_config

    words = [f"model={preset}", "model.vocab_size=30522", "name=x", "steps=1", "batch.global_size=1"]
    words += [f"model.head={head}"] + (["model.num_classes=5"] if head == "classification" else [])
    config = to_config(compose(words))
    form = format_of(config.model, None)
    with torch.device("meta"):
        ours = build(config.model, "model")
        theirs = getattr(transformers, form.architecture)(transformers.BertConfig(**form.config))
    d_model, layers, heads, d_ff = SHAPES[preset]
    shape = theirs.config
    assert (shape.hidden_size, shape.num_hidden_layers) == (d_model, layers)
    assert (shape.num_attention_heads, shape.intermediate_size) == (heads, d_ff)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.skipif("MINILM" not in os.environ, reason="MINILM names no folder of the real weights")
def test_real_weights_give_the_vectors_of_transformers():
    """MINILM=FOLDER: a checkpoint of a bare BertModel, such as sentence-transformers/all-MiniLM-L6-v2."""
    from trainer.build import build
    from trainer.data.tokenizer import load_tokenizer

    folder = Path(os.environ["MINILM"])
    part = part_of(json.loads((folder / "config.json").read_text()))
    model = build(part, "model")
    for name, value in weights_of(folder, part).items():
        model.get_parameter(name).data.copy_(value.view(model.get_parameter(name).shape))
    theirs = transformers.BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    texts = ["A web server for small machines", "Development files of a library for vectors and matrices"]
    rows = [[tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]
    length = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_id] * (length - len(row)) for row in rows])
    mask = torch.arange(length) < torch.tensor([[len(row)] for row in rows])
    with torch.inference_mode():
        expected = theirs(input_ids=ids, attention_mask=mask.long())
        hidden = model.eval()({"input_ids": ids, "attention_mask": mask})
        assert_close(hidden[mask], expected.last_hidden_state[mask])
        assert_close(model.pool(hidden), expected.pooler_output)
