"""Marian's logits and text, on random shapes and weights, both ways."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from tests.formats.parity import both_ways, ours_of, pair_of, same_text  # noqa: E402
from tests.formats.test_bart import make  # noqa: E402
from trainer.models.encoder_decoder import EncoderDecoder  # noqa: E402


@settings(max_examples=6)
@given(
    scale=st.booleans(),
    layers=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    activation=st.sampled_from(["relu", "gelu", "swish"]),
    source=st.integers(1, 60),
    target=st.integers(1, 40),
)
def test_logits(scale, layers, activation, source, target):
    theirs = make("marian", layers, scale_embedding=scale, activation_function=activation)
    both_ways(theirs, *pair_of(61, source, target))


@pytest.mark.parametrize("beams", [1, 4])
def test_text(beams, tmp_path):
    """A target begins with padding, as Marian's do."""
    theirs = make("marian", decoder_start_token_id=0, activation_function="swish", scale_embedding=True)
    ours = ours_of(theirs, tmp_path)
    assert isinstance(ours, EncoderDecoder)
    same_text(theirs, ours, 9, beams)
