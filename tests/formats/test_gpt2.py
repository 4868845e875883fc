"""GPT-2's logits on random shapes and weights, both ways, and its text, token for token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from tests.formats.parity import assert_same_text, both_ways, ids_of, prompts_of, scattered  # noqa: E402
from trainer.build import build  # noqa: E402
from trainer.errors import ConfigError  # noqa: E402
from trainer.formats.catalogue import part_of  # noqa: E402
from trainer.pretrained import open_weights  # noqa: E402


def gpt2(**options):
    shape = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}
    shape |= {"bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    return scattered(transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**shape, **options})))


@settings(max_examples=8)
@given(
    heads=st.sampled_from([1, 2, 4]),
    inner=st.sampled_from([None, 40]),
    tie=st.booleans(),
    layers=st.integers(1, 3),
    activation=st.sampled_from(["gelu_new", "gelu_pytorch_tanh"]),
    length=st.integers(1, 96),
)
def test_logits(heads, inner, tie, layers, activation, length):
    theirs = gpt2(n_head=heads, n_inner=inner, tie_word_embeddings=tie, n_layer=layers, activation_function=activation)
    ids = ids_of(61, length)
    both_ways(theirs, {"input_ids": ids}, {"input_ids": ids})


def test_text_of_prompts_of_different_lengths():
    assert_same_text(gpt2(), prompts_of(61, [7, 3, 12, 1]))


def test_the_bare_model_as_it_was_published_has_no_prefix_and_masks_besides(tmp_path):
    theirs = gpt2()
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    tensors["h.0.attn.bias"] = tensors["wpe.weight"].tril()
    save_file(tensors, path)
    part = part_of(theirs.config.to_dict())
    shapes = {name: parameter.shape for name, parameter in build(part, "model").named_parameters()}
    weights = open_weights(f"hf:{tmp_path}", "runs", part, shapes)
    qkv = theirs.transformer.h[1].attn.c_attn.weight.t().flatten()
    assert weights.values("layers.1.attention.qkv.weight").equal(qkv)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true"),
        ({"scale_attn_weights": False}, "scale_attn_weights=false"),
        ({"activation_function": "relu"}, "activation_function=relu"),
        ({"embd_pdrop": 0.3}, "resid_pdrop and embd_pdrop that differ"),
    ],
)
def test_what_our_decoder_does_not_have_is_refused(options, named):
    with pytest.raises(ConfigError, match=f"our Decoder has no {named}"):
        part_of(transformers.GPT2Config(**options).to_dict())
