"""The pair of sentencepiece models that OPUS-MT's folders have: the ids of transformers' MarianTokenizer on both sides,
and a run that begins with such a folder."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch

sentencepiece = pytest.importorskip("sentencepiece")
transformers = pytest.importorskip("transformers")

from tests.conftest import ROOT  # noqa: E402
from tests.formats import test_bart  # noqa: E402
from tests.test_pretrained import MODELS, PAIRS, first_loss, here  # noqa: E402
from trainer.data.opus import read_pair  # noqa: E402
from trainer.data.tokenizer import FileTokenizer, Tokenizer  # noqa: E402
from trainer.errors import ConfigError, DataError  # noqa: E402
from trainer.export.__main__ import main  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")

CORPUS = ROOT / "trainer/data/corpora/homeassistant_en_de/validation.jsonl.gz"
SOURCES = ["Turn on the light in the kitchen", "The door of the garage is open", "switch it off", "nobody is at home"]
TARGETS = ["Schalte das Licht in der Küche ein", "Die Tür der Garage ist offen", "schalte es aus", "niemand ist da"]
STRANGE = ["  two  spaces ", "Fuß ﬁne Ⅳ", "x", "漢字 open", "KITCHEN!?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two models, a vocabulary that lacks one piece of the sources', and a Marian of random weights."""
    found = tmp_path_factory.mktemp("opus") / "model"
    found.mkdir()
    pieces: set[str] = set()
    for side, texts in (("source", SOURCES), ("target", TARGETS)):
        with (found / f"{side}.spm").open("wb") as file:
            key = {"source": "en", "target": "de"}[side]
            more = [row[key] for row in map(json.loads, gzip.decompress(CORPUS.read_bytes()).splitlines())]
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter([*texts, *more]), model_writer=file, vocab_size=200, minloglevel=2
            )
        model = sentencepiece.SentencePieceProcessor(model_file=str(found / f"{side}.spm"))
        pieces |= {model.id_to_piece(id_) for id_ in range(3, model.vocab_size())}
    pieces -= {"k"}
    vocabulary = ["</s>", "<unk>", ">>de<<", *sorted(pieces), "<pad>"]
    (found / "vocab.json").write_text(json.dumps({name: id_ for id_, name in enumerate(vocabulary)}))
    (found / "tokenizer_config.json").write_text('{"source_lang": "en", "target_lang": "de"}')
    pad = len(vocabulary) - 1
    options = {"activation_function": "swish", "scale_embedding": True, "decoder_start_token_id": pad}
    test_bart.make("marian", vocab_size=len(vocabulary), pad_token_id=pad, eos_token_id=0, **options).save_pretrained(
        found
    )
    return found


def test_ids_and_texts_are_marians(folder: Path) -> None:
    theirs = transformers.MarianTokenizer.from_pretrained(folder)
    ours = FileTokenizer(str(folder)).prepare(lambda: iter(()))
    again = Tokenizer.from_json(ours.to_json())
    assert (ours.eos_id, ours.unk_id, ours.pad_id) == (0, 1, theirs.pad_token_id) and ours.vocab_size == len(theirs)
    for texts, mode, side in ((SOURCES, {}, ours), (TARGETS, {"target": True}, again.for_targets)):
        texts = [*texts, *STRANGE, *PAIRS[0], ">>de<< The door"]
        expected = [theirs(**{"text_target" if mode else "text": text}).input_ids for text in texts]
        assert [[*ids, 0] for ids in side.encode_batch(texts)] == expected
    ids = again.for_targets.encode_batch(TARGETS)
    assert again.decode_batch(ids) == TARGETS
    assert again.entries() == json.loads((folder / "vocab.json").read_text()) == theirs.get_vocab()


def test_a_run_begins_with_the_folder_and_goes_back(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        rows = (json.dumps({"en": en, "de": de}) + "\n" for en, de in zip(SOURCES, TARGETS, strict=True))
        (tmp_path / f"{split}.jsonl").write_text("".join(rows))
    theirs = transformers.MarianMTModel.from_pretrained(folder).eval()
    size = theirs.config.vocab_size
    words = [
        *MODELS["marian"], f"init_from=hf:{folder}", "tokenizer=file", f"tokenizer.path={folder}",
        f"tokenizer.vocab_size={size}", "task.label_smoothing=0", "data=files", f"data.path={tmp_path}", "name=run",
        "steps=1", "precision=fp32", "batch.global_size=4", "schedule=constant", "schedule.warmup=0", "optimizer.lr=0",
        "log.every=1", "eval.final_split=none", "checkpoint=end", "logging=[]",
    ]  # fmt: skip
    here(words, tmp_path / "runs")
    tokenizer = transformers.MarianTokenizer.from_pretrained(folder)
    given = tokenizer(SOURCES, text_target=TARGETS, padding=True, return_tensors="pt")
    labels = given.labels.masked_fill(given.labels == tokenizer.pad_token_id, -100)
    with torch.inference_mode():
        loss = theirs(input_ids=given.input_ids, attention_mask=given.attention_mask, labels=labels).loss
    assert first_loss(tmp_path / "runs") == pytest.approx(float(loss), rel=1e-5)

    assert main([f"runs_dir={tmp_path / 'runs'}", "run=run", f"to={tmp_path / 'out'}", "dtype=fp32"]) == 0
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported(SOURCES[1:3]).input_ids == tokenizer(SOURCES[1:3]).input_ids

    other = [word for word in words if not word.startswith("tokenizer")]
    with pytest.raises(ConfigError, match=r"model has another vocabulary.*tokenizer\.path="):
        here([*other, "tokenizer=byte", "name=other"], tmp_path / "runs")


def test_damaged_files_are_named(folder: Path, tmp_path: Path) -> None:
    for name, text, told in (
        ("vocab.json", '{"a": 7}', "ids do not count from 0"),
        ("vocab.json", "[]", "cannot be read as a vocabulary"),
        ("target.spm", "nonsense", "sentencepiece"),
    ):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "bad")
        (tmp_path / "bad" / name).write_text(text)
        with pytest.raises(DataError, match=rf"{name}: .*{told}"):
            read_pair(tmp_path / "bad")
