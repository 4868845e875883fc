"""Qwen2's and Qwen3's logits on random shapes and weights, both ways, and their text, token for token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from tests.formats.parity import assert_same_text, both_ways, ids_of, prompts_of, scattered  # noqa: E402
from trainer.errors import ConfigError  # noqa: E402
from trainer.formats.catalogue import part_of  # noqa: E402


def qwen(number, **options):
    shape = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"Qwen{number}Config")(**{**shape, **options})
    return scattered(getattr(transformers, f"Qwen{number}ForCausalLM")(config))


@settings(max_examples=10)
@given(
    number=st.sampled_from([2, 3]),
    kv=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([6, 8, 12]),
    tie=st.booleans(),
    layers=st.integers(1, 3),
    yarn=st.booleans(),
    length=st.integers(1, 80),
)
def test_logits(number, kv, head_dim, tie, layers, yarn, length):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}
    theirs = qwen(
        number,
        num_key_value_heads=kv,
        head_dim=head_dim,
        tie_word_embeddings=tie,
        num_hidden_layers=layers,
        **({"rope_parameters": rope} if yarn else {}),
    )
    ids = ids_of(61, length)
    both_ways(theirs, {"input_ids": ids}, {"input_ids": ids})


@pytest.mark.parametrize("number", [2, 3])
def test_text_of_prompts_of_different_lengths(number):
    assert_same_text(qwen(number), prompts_of(61, [7, 3, 12, 1]))


@pytest.mark.parametrize(
    ("number", "options", "named"),
    [
        (2, {"use_sliding_window": True, "max_window_layers": 0}, "use_sliding_window=true"),
        (3, {"attention_bias": True}, "attention_bias=true"),
    ],
)
def test_what_our_decoder_does_not_have_is_refused(number, options, named):
    config = getattr(transformers, f"Qwen{number}Config")(**options).to_dict()
    with pytest.raises(ConfigError, match=f"our Decoder has no {named}"):
        part_of(config)
