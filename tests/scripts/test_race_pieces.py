"""The files that the race gives to toolkits which want text already cut: nothing is lost on the way there and back."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[2]
PAIRS = [
    ("Open the file", "Öffne die Datei"),
    ("a</s> b, c", "„a“ + b"),
    ("x\u2028y\u3000z", "1\u00a02"),
    ("ja", "nein"),
]


def test_cut_files_hold_the_pairs_and_come_back_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "bench" / "race"))
    import pieces

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = ["<pad>", "<s>", "</s>", "<unk>"], pre_tokenizers.ByteLevel.alphabet()
    texts = [text for pair in PAIRS for text in pair]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    lines = "".join(json.dumps({"source": source, "target": target}) + "\n" for source, target in PAIRS)
    (tmp_path / "pairs.jsonl").write_text(lines, encoding="utf-8")
    spec = {
        "cache": str(tmp_path / "cache"),
        "tokenizer": str(tmp_path / "tokenizer.json"),
        "ids": {"eos": 2},
        "data": {split: str(tmp_path / "pairs.jsonl") for split in ("train", "validation")},
        "validation_samples": 2,
    }

    folder = pieces.cut(spec)

    sides = [(folder / f"train.{side}").read_text(encoding="utf-8").splitlines() for side in ("source", "target")]
    assert [pieces.joined_lines(spec, side) for side in sides] == [
        [" ".join(text.splitlines()) for text in side] for side in zip(*PAIRS, strict=True)
    ]
    assert len((folder / "validation.target").read_text(encoding="utf-8").splitlines()) == 2
    assert pieces.cut_lines(spec, [source for source, _ in PAIRS]) == sides[0]
    assert pieces.vocabulary(spec)[:4] == special
    assert "</s>" not in " ".join(sides[0]).split()
    lengths = [(len(source.split()), len(target.split())) for source, target in zip(*sides, strict=True)]
    assert pieces.longer(folder) == sum(max(source, target + 2) for source, target in lengths) / len(PAIRS)
