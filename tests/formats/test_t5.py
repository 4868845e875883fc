"""T5's logits, on random shapes and weights, both ways."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from tests.formats.parity import both_ways, pair_of, scattered  # noqa: E402


@settings(max_examples=8, deadline=None)
@given(
    gated=st.booleans(),
    tie=st.booleans(),
    d_kv=st.sampled_from([4, 8]),
    layers=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    source=st.integers(1, 150),
    target=st.integers(1, 40),
)
def test_logits(gated, tie, d_kv, layers, source, target):
    config = transformers.T5Config(
        vocab_size=61,
        d_model=32,
        d_kv=d_kv,
        d_ff=40,
        num_layers=layers[0],
        num_decoder_layers=layers[1],
        num_heads=4,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=tie,
        relative_attention_max_distance=64,
    )
    theirs = transformers.T5ForConditionalGeneration(config)
    if not tie:
        theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.detach().clone())
    both_ways(scattered(theirs), *pair_of(61, source, target))
