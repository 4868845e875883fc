"""The laps of the race: data, tokenizer and shape of each, made once in a folder and the same for all entrants."""

from __future__ import annotations

import gzip
import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[3]
CORPORA = ROOT / "trainer" / "data" / "corpora"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")

OPTIMIZER = {
    "lr": 1e-3,
    "betas": [0.9, 0.98],
    "eps": 1e-8,
    "weight_decay": 0.01,
    "clip_norm": 1.0,
    "warmup": 200,
}


def _pairs(d_model: int, layers: int, vocab_size: int = 8000, **other: Any) -> dict[str, Any]:
    shape = {"d_model": d_model, "num_heads": max(d_model // 64, 2), "d_ff": 4 * d_model, "dropout": 0.1}
    model = {**shape, "encoder_layers": layers, "decoder_layers": layers}
    lap = {"kind": "pairs", "model": model, "vocab_size": vocab_size, "batch": 64, "max_length": 128}
    return {**lap, "source": "data/parallel_en_de", **other}


def _packed(d_model: int, layers: int, vocab_size: int, **other: Any) -> dict[str, Any]:
    shape = {"d_model": d_model, "num_heads": max(d_model // 64, 2), "d_ff": d_model * 8 // 3 // 16 * 16}
    model = {**shape, "dropout": 0.0, "num_layers": layers}
    lap = {"kind": "packed", "model": model, "vocab_size": vocab_size, "batch": 4, "max_length": 512}
    return {**lap, "source": "python_docs", **other}


LAPS: dict[str, dict[str, Any]] = {
    "pairs256": _pairs(256, 4),
    "pairs512": _pairs(512, 4),
    "packed256": _packed(256, 4, 4096),
    "packed256_32k": _packed(256, 4, 32000),
    "packed512": _packed(512, 4, 4096),
    "packed1024": _packed(1024, 4, 4096, batch=8),
    "learn": _pairs(128, 2, 3000, source="homeassistant_en_de", max_length=64, optimizer={**OPTIMIZER, "lr": 2e-3}),
    "tiny": _pairs(32, 1, 1000, source="homeassistant_en_de", batch=16, max_length=48),
}
"""By name: the shape, and where the text comes from: a folder made by scripts/data/parallel.py, or a corpus that comes
with the package."""


def prepare(name: str, work: Path) -> dict[str, Any]:
    """The part of an entrant's SPEC.json (see `common`) that the lap decides; makes what is missing in `work`."""
    lap = LAPS[name]
    folder = work / "laps" / f"{Path(lap['source']).name}_{lap['vocab_size']}_{lap['max_length']}"
    if not (folder / "facts.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _make(lap, folder)
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    spec = {key: value for key, value in lap.items() if key != "source"}
    data = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    return {
        **spec,
        **facts,
        "lap": name,
        "data": data,
        "tokenizer": str(folder / "tokenizer.json"),
        "ids": {"pad": 0, "bos": 1, "eos": 2},
        "optimizer": lap.get("optimizer", OPTIMIZER),
        "parameters": count_parameters(lap),
        "precision": "bf16",
        "validation_samples": 500,
        "cache": str(folder / "cache"),
    }


def count_parameters(lap: dict[str, Any]) -> int:
    """Trained parameters of the shape, tied token vectors once: Marian's without the bias of its output, or Llama's."""
    model = lap["model"]
    d, d_ff, vectors = model["d_model"], model["d_ff"], lap["vocab_size"] * model["d_model"]
    if lap["kind"] == "packed":
        return vectors + model["num_layers"] * (4 * d * d + 3 * d * d_ff + 2 * d) + d
    attention, norm, feed_forward = 4 * (d * d + d), 2 * d, 2 * d * d_ff + d_ff + d
    encoder = attention + feed_forward + 2 * norm
    decoder = 2 * attention + feed_forward + 3 * norm
    return int(vectors + model["encoder_layers"] * encoder + model["decoder_layers"] * decoder)


def _make(lap: dict[str, Any], folder: Path) -> None:
    """Texts of all splits, the tokenizer of the train split, and what the lengths are."""
    splits = {split: list(_records(lap["source"], split)) for split in ("train", "validation", "test")}
    tokenizer = _train_tokenizer((text for r in splits["train"] for text in r.values()), lap["vocab_size"])
    tokenizer.save(str(folder / "tokenizer.json"))
    lengths: list[list[int]] = []
    for split, records in splits.items():
        sizes = [
            [len(e.ids) + 1 for e in tokenizer.encode_batch_fast([r[name] for r in records], add_special_tokens=False)]
            for name in records[0]
        ]
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for record, *size in zip(records, *sizes, strict=True):
                if lap["kind"] == "packed" or max(size) <= lap["max_length"]:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    lengths += [size] if split == "train" else []
    facts = {"mean_lengths": [statistics.mean(side) for side in zip(*lengths, strict=True)], "samples": len(lengths)}
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _records(source: str, split: str) -> Iterator[dict[str, str]]:
    folder = ROOT / source if "/" in source else CORPORA / source
    path = folder / f"{split}.jsonl.gz"
    if not path.exists():
        raise SystemExit(f"{path} is missing: python scripts/data/parallel.py makes it")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            yield {"text": row["text"]} if "text" in row else {"source": row["en"], "target": row["de"]}


def _train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    from trainer.data.tokenizer import TrainedTokenizer

    trained = TrainedTokenizer("bpe", size).prepare(lambda: iter(texts))
    backend = Tokenizer.from_str(trained.to_json())
    backend.encode_special_tokens = True
    return backend
