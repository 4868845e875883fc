"""A published Whisper goes on where it was left: its prompt tokens in training, in its texts and in the export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("soundfile")
pytest.importorskip("jiwer")

from tests.data.test_audio import tone, wav  # noqa: E402
from tests.formats.parity import scattered  # noqa: E402
from tests.test_pretrained import first_loss, here  # noqa: E402
from trainer.data.audio import log_mel  # noqa: E402
from trainer.data.tokenizer import ByteTokenizer  # noqa: E402
from trainer.errors import ConfigError  # noqa: E402
from trainer.export.__main__ import main  # noqa: E402
from trainer.restore import restore_run  # noqa: E402
from trainer.tasks import Decoding  # noqa: E402
from trainer.tasks.speech_recognition import SpeechRecognition  # noqa: E402

PROMPT = ["<|startoftranscript|>", "<|ru|>", "<|transcribe|>", "<|notimestamps|>"]
TOKENIZER = ByteTokenizer(264, PROMPT).prepare(lambda: iter(()))
TEXTS = ["da", "net", "a", "moskva"]


def sound(number: int) -> np.ndarray:
    noise = np.random.default_rng(number).standard_normal(len(tone(300.0, 0.5))).astype(np.float32)
    return (0.3 * tone(300.0 + 90 * number, 0.5) + 0.05 * noise).astype(np.float32)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run that begins with a small Whisper, its tokenizer beside it, and does not change it."""
    folder = tmp_path_factory.mktemp("whisper") / "public"
    torch.manual_seed(3)
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder")
             for key, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 40))}  # fmt: skip
    config = transformers.WhisperConfig(
        vocab_size=264, d_model=32, num_mel_bins=8, **sides, max_source_positions=50, max_target_positions=24,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=260, begin_suppress_tokens=None,
    )  # fmt: skip
    theirs = transformers.WhisperForConditionalGeneration(config)
    kept = theirs.model.encoder.embed_positions.weight.detach().clone()
    scattered(theirs)
    with torch.no_grad():
        theirs.model.encoder.embed_positions.weight.copy_(kept)
        theirs.model.decoder.embed_positions.weight.mul_(20.0)  # so that a text has several tokens
    theirs.save_pretrained(folder)
    TOKENIZER.save(folder / "tokenizer.json")
    rows = [{"audio": {"bytes": wav(sound(n)), "path": f"{n}.wav"}, "text": text} for n, text in enumerate(TEXTS)]
    for split in ("train", "validation", "test"):
        pq.write_table(pa.Table.from_pylist(rows), folder.parent / f"{split}.parquet")
    return (
        f"model=speech model.num_mels=8 model.d_model=32 model.num_heads=2 model.d_ff=40 model.encoder_layers=1"
        f" model.decoder_layers=1 model.max_source_positions=50 model.max_positions=24 init_from=hf:{folder}"
        f" task=speech_recognition task.num_mels=8 task.max_seconds=1 task.fill=true task.max_target_length=12"
        f" task.label_smoothing=0 task.beam_size=1 tokenizer=file tokenizer.path={folder} tokenizer.vocab_size=264"
        f" data=files data.path={folder.parent} name=run steps=1 batch.global_size=4 precision=fp32 optimizer.lr=0"
        " schedule=constant schedule.warmup=0 log.every=1 eval.final_split=none checkpoint=end logging=[]"
    ).split()


def test_without_its_prompt_it_is_refused(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r'begins its targets with <\|startoftranscript\|>.*set task\.prompt=\["<\|st'
    ):
        here(words, tmp_path)
    with pytest.raises(ConfigError, match=r"<\|xx\|> is no token of the tokenizer's"):
        SpeechRecognition(TOKENIZER, prompt=[PROMPT[0], "<|xx|>"])


def test_its_loss_and_its_text_are_theirs_before_and_after(words: list[str], tmp_path: Path) -> None:
    here([*words, f"task.prompt={json.dumps(PROMPT)}"], tmp_path / "runs")
    public = words[[word.startswith("init_from") for word in words].index(True)].partition("hf:")[2]
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(public).eval()
    begin = [TOKENIZER.id_of(name) for name in PROMPT]
    ids = [[*begin, *text, 2] for text in TOKENIZER.encode_batch(TEXTS)]
    longest = max(map(len, ids))
    labels = torch.tensor([[-100] * 3 + row[4:] + [-100] * (longest - len(row)) for row in ids])
    inputs = torch.tensor([(row + [0] * longest)[: longest - 1] for row in ids])
    samples = [np.pad(sound(n), (0, 8000)) for n in range(4)]
    features = torch.from_numpy(np.stack([log_mel(one, 8).astype(np.float16).astype(np.float32) for one in samples]))
    with torch.inference_mode():
        loss = theirs(input_features=features.transpose(1, 2), decoder_input_ids=inputs, labels=labels).loss
        assert first_loss(tmp_path / "runs") == pytest.approx(float(loss), rel=1e-4)  # a WAV of 16 bits

        assert main([f"runs_dir={tmp_path / 'runs'}", "run=run", f"to={tmp_path / 'out'}", "dtype=fp32"]) == 0
        run = restore_run("run", str(tmp_path / "runs"))
        encoded = run.task.encode([{"audio": {"array": one, "sampling_rate": 16_000}, "text": "a"} for one in samples])
        expected = run.task.generate(run.model, encoded, how=Decoding(beam_size=1))
        exported = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out").eval()
        extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "out")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        given = extractor([sound(n) for n in range(4)], sampling_rate=16_000, return_tensors="pt").input_features
        written = exported.generate(given)
    assert [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)] == expected
    assert any(expected)
