"""T5's logits and text, on random shapes and weights, both ways; mT5's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from tests.formats.parity import both_ways, ours_of, pair_of, same_text, scattered  # noqa: E402
from trainer.errors import ConfigError  # noqa: E402
from trainer.formats.catalogue import part_of  # noqa: E402


def make(kind="t5", tie=False, layers=(1, 2), d_kv=8, projection="gated-gelu", shared=False, **options):
    """A model of transformers, whose head is a table of its own unless `tie`, or the `shared` one unscaled."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, d_model=32, d_kv=d_kv, d_ff=40, num_layers=layers[0], num_decoder_layers=layers[1],
        num_heads=4, feed_forward_proj=projection, tie_word_embeddings=tie, relative_attention_max_distance=64,
        **{"vocab_size": 61, "decoder_start_token_id": 0, **options},
    )  # fmt: skip
    theirs = transformers.AutoModelForSeq2SeqLM.from_config(config)
    if not tie and not shared:
        theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.detach().clone())
    return scattered(theirs)


@settings(max_examples=8)
@given(
    projection=st.sampled_from(["relu", "gated-gelu", "gated-silu", "gelu"]),
    tie=st.booleans(),
    d_kv=st.sampled_from([4, 8]),
    layers=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    epsilon=st.sampled_from([1e-6, 1e-3]),
    source=st.integers(1, 150),
    target=st.integers(1, 40),
)
def test_logits(projection, tie, d_kv, layers, epsilon, source, target):
    theirs = make("t5", tie, layers, d_kv, projection, layer_norm_epsilon=epsilon)
    both_ways(theirs, *pair_of(61, source, target))


@pytest.mark.parametrize("shared", [False, True])
def test_logits_of_mt5(shared):
    both_ways(make("mt5", shared=shared), *pair_of(61, 20, 10))


def test_a_head_that_transformers_has_tied_without_scaling_is_read_from_the_embedding():
    both_ways(make("t5", shared=True), *pair_of(61, 20, 10))


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_text(kind, beams, tmp_path):
    theirs = make(kind, tie=kind == "t5", layers=(2, 2))  # transformers' cache counts the encoder's layers
    same_text(theirs, ours_of(theirs, tmp_path), 9, beams)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "gated-relu"}, "feed_forward_proj=gated-relu; it has relu, .*gated-gelu"),
        ({"model_type": "umt5"}, "model_type='umt5' .* known are .*t5"),
    ],
)
def test_what_our_model_does_not_have_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        part_of({**make().config.to_dict(), **change})
