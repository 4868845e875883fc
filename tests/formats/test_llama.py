"""Llama's logits on random shapes and weights, both ways, and its text, token for token."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from tests.formats.parity import assert_same_text, both_ways, ids_of, prompts_of, scattered  # noqa: E402
from trainer.build import build  # noqa: E402
from trainer.errors import ConfigError  # noqa: E402
from trainer.formats.catalogue import format_of, part_of  # noqa: E402
from trainer.pretrained import open_weights  # noqa: E402

SCALINGS = {
    "default": {},
    "linear": {"factor": 2.5},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 4.0, "beta_slow": 0.5},
    "yarn, amplified": {"factor": 2.0, "original_max_position_embeddings": 128, "attention_factor": 1.3},
}


def llama(**options):
    shape = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    return scattered(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, **options})))


def rope(kind: str, base: float = 10_000.0) -> dict[str, object]:
    return {"rope_type": kind.partition(",")[0], "rope_theta": base, **SCALINGS[kind]}


@settings(max_examples=12)
@given(
    kv=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([None, 6, 8]),
    tie=st.booleans(),
    layers=st.integers(1, 3),
    base=st.sampled_from([10_000.0, 500_000.0]),
    scaling=st.sampled_from(sorted(SCALINGS)),
    length=st.integers(1, 90),
)
def test_logits(kv, head_dim, tie, layers, base, scaling, length):
    theirs = llama(
        num_hidden_layers=layers,
        num_key_value_heads=kv,
        head_dim=head_dim,
        tie_word_embeddings=tie,
        rope_parameters=rope(scaling, base),
    )
    ids = ids_of(61, length)
    both_ways(theirs, {"input_ids": ids}, {"input_ids": ids})


@pytest.mark.parametrize("scaling", ["default", "llama3", "yarn"])
def test_text_of_prompts_of_different_lengths(scaling):
    theirs = llama(num_key_value_heads=2, rope_parameters=rope(scaling))
    assert_same_text(theirs, prompts_of(61, [7, 3, 12, 1]))


def test_the_spelling_of_older_files():
    config = transformers.LlamaConfig().to_dict()
    del config["rope_parameters"]
    given = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    part = part_of({**config, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **given}})
    assert (part["rotary_base"], part["rotary_scaling"]) == (5e5, {"rope_type": "llama3", **given})
    old = part_of({**config, "max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", "factor": 2.0}})
    assert old["rotary_scaling"] == {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}
    assert format_of(part, None).config["rope_scaling"]["rope_theta"] == 5e5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"attention_bias": True}, "attention_bias=true"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type=dynamic .it has linear, llama3, yarn",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "rope_parameters.mscale=0.7"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_our_decoder_does_not_have_is_refused(options, named):
    with pytest.raises(ConfigError, match=f"our Decoder has no {named}"):
        part_of({**transformers.LlamaConfig().to_dict(), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "layer"}, "Llama is the nearest: model.norm=layer .Llama: rms"),
        ({"bias": "qkv", "qk_norm": True}, "Qwen2 and Qwen3 is the nearest: model.qk_norm=True .Qwen2: False"),
        ({"bias": "all", "norm": "layer", "positions": "learned"}, "GPT-2 is the nearest: model.activation=swiglu"),
    ],
)
def test_a_decoder_without_a_counterpart_says_what_the_nearest_has_otherwise(options, message):
    with pytest.raises(ConfigError, match=message):
        format_of({"_target_": "trainer.models.decoder.Decoder", "vocab_size": 61, **options}, None)


def test_weights_fit_a_configuration_that_says_the_same_in_other_words(tmp_path):
    llama().save_pretrained(tmp_path)
    part = {"_target_": "trainer.models.decoder.Decoder", "vocab_size": 61, "d_model": 32, "num_heads": 4, "d_ff": 40}
    part |= {"num_layers": 2, "head_dim": None, "num_kv_heads": None, "rotary_base": 10_000.0, "norm_eps": 1e-6}
    shapes = {name: parameter.shape for name, parameter in build(part, "model").named_parameters()}
    assert open_weights(f"hf:{tmp_path}", "runs", part, shapes).values("norm.weight").shape == (32,)
    wrong = {**part, "rotary_scaling": {"rope_type": "linear", "factor": 2.0}, "num_heads": 8}
    words = "model.num_heads=4 model.num_kv_heads=4 model.head_dim=8 model.rotary_scaling=null"
    with pytest.raises(ConfigError, match=re.escape(f"set {words}.")):
        open_weights(f"hf:{tmp_path}", "runs", wrong, shapes)


def test_a_scaling_is_told_as_a_word_of_the_command_line(tmp_path):
    llama(rope_parameters=rope("linear")).save_pretrained(tmp_path)
    part = {**part_of(llama().config.to_dict()), "rotary_scaling": None}
    with pytest.raises(ConfigError, match=re.escape("set model.rotary_scaling={rope_type:linear,factor:2.5}.")):
        open_weights(f"hf:{tmp_path}", "runs", part, {})
