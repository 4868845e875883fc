"""How deep and wide a decoder of a given number of parameters is."""

from __future__ import annotations

import itertools

import pytest
import torch

from trainer.composition import compose
from trainer.config import to_config
from trainer.errors import ConfigError
from trainer.formats.catalogue import format_of
from trainer.models.decoder import ScaledDecoder
from trainer.models.scaling import Shape, scaled_shape

TARGETS = [2e6 * 1.37**step for step in range(35)]  # to 88 billion


@pytest.mark.parametrize(("vocab_size", "tie", "group"), [(256, True, 1), (4096, False, 1), (32_000, True, 8)])
def test_shapes_have_about_the_parameters_asked_for_and_grow_with_them(vocab_size, tie, group):
    targets = [target for target in TARGETS if target > 40 * 512 * vocab_size / 32]
    shapes = [scaled_shape(target, vocab_size, tie, group) for target in targets]
    for before, after in itertools.pairwise(shapes):
        assert before.parameters(vocab_size, tie) < after.parameters(vocab_size, tie)
        assert before.d_model <= after.d_model
    for target, shape in zip(targets, shapes, strict=True):
        assert shape.parameters(vocab_size, tie) == pytest.approx(target, rel=0.03)
        assert shape.num_heads == group * shape.num_kv_heads and shape.d_model % shape.num_heads == 0
        assert shape.d_model // shape.num_heads in (64, 128) and shape.d_ff % 64 == 0
        assert 1.5 < shape.d_ff / shape.d_model < 4
        if group == 1 and target > 2e7:
            assert 80 <= shape.d_model / shape.num_layers <= 172


@pytest.mark.parametrize("tie", [False, True])
def test_the_count_is_the_models(tie):
    with torch.device("meta"):
        model = ScaledDecoder(1000, 3e7, group_size=2, tie_embeddings=tie)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == scaled_shape(3e7, 1000, tie, 2).parameters(1000, tie) == pytest.approx(3e7, rel=0.02)


def test_llamas_own_number_gives_llamas_own_shape():
    assert scaled_shape(6_738_415_616, 32_000) == Shape(4096, 32, 32, 11_008, 32)


def test_the_number_is_all_that_a_configuration_says_and_the_result_is_a_llama():
    words = ["name=x", "steps=1", "batch.global_size=1", "task=causal_lm", "tokenizer.vocab_size=512"]
    part = to_config(compose([*words, "model=decoder_scaled", "model.parameters=5e6"])).model
    config = format_of(part, None).config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] == 64 * config["num_attention_heads"] > 128


def test_fewer_parameters_than_the_vocabulary_needs_are_refused():
    with pytest.raises(ConfigError, match=r"model.parameters=1e\+06 is fewer than the .* model.vocab_size=32000"):
        scaled_shape(1e6, 32_000)
