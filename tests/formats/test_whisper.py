"""Whisper's logits and what it writes, on random shapes and weights, both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from tests.data.test_audio import tone, wav  # noqa: E402
from tests.formats.parity import both_ways, ids_of, ours_of, scattered  # noqa: E402
from trainer.build import build  # noqa: E402
from trainer.decoding import BeamOptions, beam_search  # noqa: E402
from trainer.errors import CheckpointError, ConfigError  # noqa: E402
from trainer.export.__main__ import main  # noqa: E402
from trainer.formats.catalogue import format_of, part_of  # noqa: E402
from trainer.models.speech import SpeechToText  # noqa: E402
from trainer.pretrained import open_weights  # noqa: E402

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


@settings(max_examples=8)
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


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("seed", [0, 3, 7])
def test_text_is_equal_token_for_token(tmp_path: Path, seed: int, beams: int):
    torch.manual_seed(seed)
    theirs = whisper(positions=10)
    with torch.no_grad():  # so that a text has several tokens and an end, and beams find others
        for layer in theirs.model.decoder.layers:
            for parameter in layer.parameters():
                parameter.mul_(6.0)
        theirs.model.decoder.embed_positions.weight.mul_(20.0)
        theirs.model.decoder.layer_norm.weight.mul_(2.0)
    ours, features = ours_of(theirs, tmp_path), features_of(8, 10, seed)
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
    assert len({token for text in written for token in text}) > 2


def test_tiny_has_as_many_parameters():
    """All but the table of positions, which ours computes."""
    with torch.device("meta"):
        theirs = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig())
        ours = SpeechToText(51865)
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters() - 1500 * 384


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
        path for path in tmp_path.glob("*.safetensors") if "model.encoder.embed_positions.weight" in load_file(path)
    )
    tensors = load_file(path)
    tensors["model.encoder.embed_positions.weight"][3, 4] += 0.1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"embed_positions\.weight differs by up to 0\.1"):
        _open(tmp_path)


def _open(folder: Path) -> None:
    part = part_of(json.loads((folder / "config.json").read_text()))
    model = build(part, "model")
    assert format_of(part, None).architecture == "WhisperForConditionalGeneration"
    open_weights(f"hf:{folder}", "runs", part, {name: p.shape for name, p in model.named_parameters()})


def test_a_run_becomes_a_whisper(run_trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Trained on recordings out of Parquet, scored, exported, loaded by transformers with nothing missing."""
    pytest.importorskip("soundfile")
    pytest.importorskip("jiwer")
    rows = [
        {"audio": {"bytes": wav(0.5 * tone(200.0 + 50 * number, 0.3)), "path": f"{number}.wav"}, "text": f"n {number}"}
        for number in range(12)
    ]
    rows.append({"audio": {"bytes": b"nothing", "path": "bad.wav"}, "text": "bad"})
    for split in ("train", "validation", "test"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
    words = (
        "experiment=speech_ru name=run tokenizer=byte model.d_model=16 model.num_heads=2 model.d_ff=16"
        " model.encoder_layers=1 model.decoder_layers=1 model.max_source_positions=50 task.max_seconds=1"
        " task.max_target_length=10 steps=2 batch.global_size=4 schedule.warmup=1 logging=[]"
        " data.max_bad_fraction=0.1 task.fill=true"
    )
    run = run_trainer([*words.split(), f"data.path={tmp_path}"]).check().runs_dir / "run"
    summary = json.loads((run / "evaluation.json").read_text())
    assert summary["eval/samples"] == 12 and summary["eval/wer"] > 0 and summary["eval/cer"] > 0
    assert "column 'audio': it cannot be decoded" in (run / "quarantine.jsonl").read_text()
    assert main(["run=run", f"runs_dir={run.parent}", f"to={tmp_path / 'out'}", "dtype=fp32"]) == 0
    assert "WhisperForConditionalGeneration" in capsys.readouterr().out
    model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out")
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    features = extractor(0.5 * tone(200.0, 0.3), sampling_rate=16_000, return_tensors="pt").input_features
    assert features.shape == (1, 80, 100)
    assert model.generate(features, max_new_tokens=3).shape[0] == 1
