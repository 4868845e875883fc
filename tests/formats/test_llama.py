"""Llama's logits, on random shapes and weights, both ways."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from tests.formats.parity import both_ways, ids_of, scattered  # noqa: E402


@settings(max_examples=8, deadline=None)
@given(
    kv=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([None, 6, 8]),
    tie=st.booleans(),
    layers=st.integers(1, 3),
    base=st.sampled_from([10_000.0, 500_000.0]),
    length=st.integers(1, 40),
)
def test_logits(kv, head_dim, tie, layers, base, length):
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv,
        head_dim=head_dim,
        tie_word_embeddings=tie,
        rope_parameters={"rope_type": "default", "rope_theta": base},
    )
    ids = ids_of(61, length)
    both_ways(scattered(transformers.LlamaForCausalLM(config)), {"input_ids": ids}, {"input_ids": ids})
