"""Logits and text of BART, mBART and Pegasus, on random shapes and weights, both ways."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from tests.formats.parity import both_ways, ours_of, pair_of, same_text, scattered  # noqa: E402
from trainer.build import build  # noqa: E402
from trainer.errors import ConfigError  # noqa: E402
from trainer.formats.catalogue import part_of  # noqa: E402
from trainer.pretrained import open_weights  # noqa: E402

KINDS = {"bart": "BartForConditionalGeneration", "mbart": "MBartForConditionalGeneration",
         "pegasus": "PegasusForConditionalGeneration"}  # fmt: skip


def make(kind, layers=(1, 2), seed=0, **options):
    """A model of transformers with random weights, and a bias of the output that is not zero."""
    torch.manual_seed(seed)
    sizes = {f"{side}_{key}": size for side in ("encoder", "decoder")
             for key, size in (("attention_heads", 4), ("ffn_dim", 40))}  # fmt: skip
    config = transformers.AutoConfig.for_model(
        kind, d_model=32, encoder_layers=layers[0], decoder_layers=layers[1], **sizes,
        **{"vocab_size": 61, "max_position_embeddings": 64, "decoder_start_token_id": 2, "eos_token_id": 1,
           "pad_token_id": 0, "forced_eos_token_id": None, **options},
    )  # fmt: skip
    theirs = scattered(transformers.AutoModelForSeq2SeqLM.from_config(config), seed)
    for table in (theirs.model.encoder.embed_positions, theirs.model.decoder.embed_positions):
        if hasattr(table, "create_weight"):  # sines and cosines are no weights
            table.weight.data = table.create_weight()
    theirs.final_logits_bias.normal_(std=0.5, generator=torch.Generator().manual_seed(seed))
    return theirs


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=3)
@given(
    scale=st.booleans(),
    layers=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    activation=st.sampled_from(["relu", "gelu", "swish"]),
    source=st.integers(1, 60),
    target=st.integers(1, 40),
)
def test_logits(kind, scale, layers, activation, source, target):
    theirs = make(kind, layers, scale_embedding=scale, activation_function=activation)
    assert type(theirs).__name__ == KINDS[kind]
    both_ways(theirs, *pair_of(61, source, target))


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_text(kind, beams, tmp_path):
    theirs = make(kind)
    same_text(theirs, ours_of(theirs, tmp_path), 9, beams)


def test_a_checkpoint_of_the_bare_model_begins_without_a_bias_of_the_output(tmp_path):
    """BartModel's tensors have no prefix, and neither head nor bias."""
    theirs = make("bart")
    theirs.model.save_pretrained(tmp_path)
    part = part_of(json.loads((tmp_path / "config.json").read_text()))
    shapes = {name: parameter.shape for name, parameter in build(part, "model").named_parameters()}
    weights = open_weights(f"hf:{tmp_path}", "runs", part, shapes)
    assert weights.values("embedding.head_bias") is None
    assert torch.equal(weights.values("embedding.weight"), theirs.model.shared.weight.detach().flatten())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_attention_heads": 2}, "decoder_attention_heads=2 beside encoder_attention_heads=4"),
        ({"decoder_ffn_dim": 48}, "decoder_ffn_dim=48 beside encoder_ffn_dim=40"),
        ({"activation_function": "tanh"}, r"activation_function=tanh \(it has relu, gelu, swish, silu\)"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=false"),
        ({"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings=false"),
    ],
)
def test_what_our_model_does_not_have_is_refused(change, message):
    with pytest.raises(ConfigError, match=f"no BART with {message}.*model=hf"):
        part_of({**make("bart").config.to_dict(), **change})
