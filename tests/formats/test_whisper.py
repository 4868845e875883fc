"""Whisper's logits and what it writes, on random shapes and weights, both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from tests.formats.parity import both_ways, ids_of, ours_of, scattered  # noqa: E402
from trainer.decoding import BeamOptions, beam_search  # noqa: E402
from trainer.errors import CheckpointError, ConfigError  # noqa: E402
from trainer.formats.catalogue import format_of, part_of  # noqa: E402

VOCABULARY, BOS, EOS, PAD = 61, 1, 2, 0


def whisper(layers: tuple[int, int] = (2, 2), mels: int = 8, positions: int = 12, heads: int = 4, **more):
    """A small Whisper; the positions of its encoder, which are computed, stay what they are."""
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=mels,
        d_model=32,
        encoder_layers=layers[0],
        decoder_layers=layers[1],
        **{f"{side}_attention_heads": heads for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": 40 for side in ("encoder", "decoder")},
        max_source_positions=positions,
        max_target_positions=24,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        decoder_start_token_id=BOS,
        begin_suppress_tokens=None,
        **more,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    table = model.model.encoder.embed_positions.weight
    kept = table.detach().clone()
    scattered(model)
    with torch.no_grad():
        table.copy_(kept)
    return model


def features_of(mels: int, positions: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 2 * positions, mels, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=8, deadline=None)
@given(
    layers=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    mels=st.sampled_from([3, 8, 80]),
    positions=st.integers(1, 40),
    heads=st.sampled_from([1, 4]),
    target=st.integers(1, 24),
)
def test_logits(layers, mels, positions, heads, target):
    features, ids = features_of(mels, positions), ids_of(VOCABULARY, target)
    both_ways(
        whisper(layers, mels, positions, heads),
        {"features": features, "decoder_input_ids": ids},
        {"input_features": features.transpose(1, 2), "decoder_input_ids": ids},
    )


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 1000), beams=st.sampled_from([1, 3]))
def test_text_is_equal_token_for_token(tmp_path_factory, seed, beams):
    torch.manual_seed(seed)
    theirs = whisper(positions=10)
    with torch.no_grad():  # so that texts end, and not all at once
        theirs.model.decoder.embed_tokens.weight.mul_(8.0)
    ours = ours_of(theirs, tmp_path_factory.mktemp("whisper"))
    features = features_of(8, 10, seed)
    options = BeamOptions(beam_size=beams, max_length=12, length_penalty=0.0)
    with torch.inference_mode():
        written = beam_search(ours, {"features": features}, BOS, EOS, PAD, options)
        # The plain generation of transformers: Whisper's own adds prompts of languages and timestamps.
        out = transformers.GenerationMixin.generate(
            theirs,
            input_features=features.transpose(1, 2),
            decoder_input_ids=torch.full((2, 1), BOS),
            num_beams=beams,
            do_sample=False,
            max_new_tokens=12,
            length_penalty=0.0,
            early_stopping=False,
            suppress_tokens=[PAD],
        )
    expected = []
    for row in out[:, 1:].tolist():
        row = row[: row.index(EOS)] if EOS in row else row
        expected.append(row)
    assert written == expected


@pytest.mark.parametrize(
    ("size", "arguments"), [("tiny", (384, 6, 1536, 4, 4)), ("small", (768, 12, 3072, 12, 12))]
)
def test_as_many_parameters(size, arguments):
    """All but the table of positions, which ours computes."""
    from trainer.models.speech import SpeechToText

    d_model, heads, d_ff, encoder_layers, decoder_layers = arguments
    config = transformers.WhisperConfig(
        d_model=d_model,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        **{f"{side}_attention_heads": heads for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": d_ff for side in ("encoder", "decoder")},
    )
    with torch.device("meta"):
        theirs = transformers.WhisperForConditionalGeneration(config)
        ours = SpeechToText(51865, 80, d_model, heads, d_ff, encoder_layers, decoder_layers)
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters() - 1500 * d_model


def test_what_ours_has_not_is_refused(tmp_path: Path):
    config = whisper().config.to_dict()
    for key, value, told in (
        ("activation_function", "relu", "activation_function=relu"),
        ("decoder_ffn_dim", 48, "encoder_ffn_dim=40 with decoder_ffn_dim=48"),
        ("scale_embedding", True, "scale_embedding=True"),
    ):
        with pytest.raises(ConfigError, match=told):
            part_of({**config, key: value})


def test_positions_that_were_trained_are_refused(tmp_path: Path):
    ours_of(whisper(), tmp_path)  # as they are, they are taken
    path = next(
        path
        for path in tmp_path.glob("*.safetensors")
        if "model.encoder.embed_positions.weight" in load_file(path)
    )
    tensors = load_file(path)
    tensors["model.encoder.embed_positions.weight"][3, 4] += 0.1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"embed_positions\.weight differs by up to 0\.1"):
        _open(tmp_path)


def _open(folder: Path) -> None:
    import json

    from trainer.build import build
    from trainer.pretrained import open_weights

    part = part_of(json.loads((folder / "config.json").read_text()))
    model = build(part, "model")
    assert format_of(part, None).architecture == "WhisperForConditionalGeneration"
    open_weights(f"hf:{folder}", "runs", part, {name: p.shape for name, p in model.named_parameters()})
