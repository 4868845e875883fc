"""The pairs as files of pieces, one pair a line, for toolkits that take text already cut by a tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import Events, encoded


def cut(spec: dict[str, Any]) -> Path:
    """The folder with {train,validation}.{source,target}, no end tokens in them, and facts.json (for `longer`)."""
    folder = Path(spec["cache"]) / "pieces"
    if (folder / "facts.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    pieces = vocabulary(spec)
    lengths = []
    for split, limit in (("train", None), ("validation", spec["validation_samples"])):
        paths = [folder / f"{split}.{side}" for side in ("source", "target")]
        with paths[0].open("w", encoding="utf-8") as sources, paths[1].open("w", encoding="utf-8") as targets:
            for sample in encoded(spec["data"][split], spec["tokenizer"], spec["ids"]["eos"], limit):
                for file, ids in ((sources, sample["source"]), (targets, sample["target"])):
                    file.write(" ".join(pieces[one] for one in ids[:-1]) + "\n")
                if split == "train":
                    lengths.append(max(len(sample["source"]) - 1, len(sample["target"]) + 1))
    facts = {"longer": sum(lengths) / len(lengths)}
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def longer(folder: Path) -> float:
    """Tokens of the longer side of a pair (a target with a token more at each end), the mean of the train split."""
    return float(json.loads((folder / "facts.json").read_text(encoding="utf-8"))["longer"])


def vocabulary(spec: dict[str, Any]) -> list[str]:
    """All pieces in the order of their ids."""
    from tokenizers import Tokenizer

    ids: dict[str, int] = Tokenizer.from_file(spec["tokenizer"]).get_vocab()
    return sorted(ids, key=lambda piece: ids[piece])


def cut_lines(spec: dict[str, Any], texts: Iterable[str]) -> list[str]:
    """Each text as its pieces."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(spec["tokenizer"])
    backend.encode_special_tokens = True
    return [" ".join(one.tokens) for one in backend.encode_batch(list(texts), add_special_tokens=False)]


def joined_lines(spec: dict[str, Any], lines: Iterable[str]) -> list[str]:
    """Each line of pieces as text."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(spec["tokenizer"])
    rows = [[backend.token_to_id(piece) for piece in line.split()] for line in lines]
    texts = backend.decode_batch([[one for one in row if one is not None] for row in rows])
    return [" ".join(text.splitlines()) for text in texts]


def write_cut(spec: dict[str, Any], to: Path) -> None:
    """The texts that are to be translated, as pieces."""
    texts = Path(spec["translate"]["input"]).read_text(encoding="utf-8").splitlines()
    to.write_text("".join(f"{line}\n" for line in cut_lines(spec, texts)), encoding="utf-8")


def write_joined(spec: dict[str, Any], made: Path) -> None:
    """What a toolkit has made of them, as text, where the driver expects it."""
    told = spec["translate"]
    lines = joined_lines(spec, made.read_text(encoding="utf-8").splitlines())
    assert len(lines) == len(Path(told["input"]).read_text(encoding="utf-8").splitlines()), "one line for each"
    Path(told["output"]).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def started(spec: dict[str, Any], toolkit: str) -> Events:
    """The events of a toolkit that trains in one process."""
    if spec["ranks"] > 1:
        raise SystemExit(f"{toolkit} has no data parallelism on CPUs")
    events = Events(spec["out"])
    events.write("start", pid=os.getpid())
    return events
