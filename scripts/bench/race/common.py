"""What entrants of the race share: the lap they are told to run, and the events they write while they run it.

An entrant is a program `ENTRANT.py SPEC.json` (or, on two ranks, the same under torchrun) that trains until it is ended
and writes OUT/events_RANK.jsonl. It runs by its own Python, so nothing of ours is imported here: standard library,
torch and tokenizers alone.

SPEC.json
    entrant, lap                 names; kind: "pairs" or "packed"
    ranks, threads               processes, and threads of each
    engine                       "plain" or "zero2" (ZeRO-2 where the entrant has it, else its own data parallelism)
    seed, precision              "bf16"
    steps                        far more than will be made
    batch                        pairs a global step on average, or rows of `max_length` tokens (packed)
    max_length                   tokens of a source, a target (end token included) or a row; no pair has a longer side
    mean_lengths                 of the train split: [source, target] tokens with the end token
    data                         {"train", "validation"}: JSON lines with "source" and "target", or "text"
    validation_samples           the first so many of the validation split are what is validated on
    tokenizer, vocab_size, ids   tokenizer.json for all; {"pad", "bos", "eos"}; a target begins with bos
    model                        d_model, num_heads, d_ff, dropout, and encoder_layers, decoder_layers (post-norm, silu,
                                 sinusoidal positions, tied embeddings: Marian) or num_layers (Llama, tied embeddings)
    parameters                   trained ones that this shape has
    optimizer                    AdamW: lr, betas, eps, weight_decay, clip_norm; warmup: steps, then lr x
                                 sqrt(warmup / step)
    save_at, save_every          a step, steps; null, 0: never
    validate_every               steps; 0: never
    out                          folder for everything the entrant writes; cache: folder it may keep between runs

To translate, the same program is called in one process with "translate": {"checkpoint", "input", "output", "beams"}
added: one text a line, in and out; at most twice as many tokens as the longest source of a batch.

Events, one JSON object a line, "time" in seconds since 1970:
    {"event": "start", "pid"}                                when main begins
    {"event": "ready", "parameters"}                         all is built
    {"event": "step", "step", "target_tokens", "loss", "padding"}
        labels that count in the loss, of this rank's share; mean loss in nats where it is at hand (never synchronise
        for it); padded share of all positions (source and target) where it is known
    {"event": "validating", "step"} {"event": "validated", "step", "loss"}    nats a target token, no smoothing
    {"event": "saved", "step", "path", "bytes"}              a checkpoint is on the disk from which training can go on
                                                             or, with save_every, one to translate with
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_spec() -> dict[str, Any]:
    """The lap that the command line names."""
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return spec


def rank() -> int:
    """Of this process, as torchrun numbers them."""
    return int(os.environ.get("RANK", "0"))


class Events:
    """The events of one rank; each is in the file when `write` returns."""

    def __init__(self, out: str | Path) -> None:
        path = Path(out)
        path.mkdir(parents=True, exist_ok=True)
        self._file = (path / f"events_{rank()}.jsonl").open("ab", buffering=0)

    def write(self, event: str, **facts: Any) -> None:
        """Append {"event": event, "time": now, **facts}."""
        self._file.write((json.dumps({"event": event, "time": time.time(), **facts}) + "\n").encode())


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, a last line that is still being written left out."""
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def factor(step: int, warmup: int) -> float:
    """What the rate of update `step` (from 0) is multiplied by: a linear warm-up, then sqrt(warmup / step)."""
    return (step + 1) / warmup if step < warmup else (warmup / (step + 1)) ** 0.5


def size_of(folder: str | Path) -> int:
    """Bytes of all files below `folder`, or of the one file."""
    path = Path(folder)
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def encoded(path: str, tokenizer: str, eos: int, limit: int | None = None) -> Iterator[dict[str, list[int]]]:
    """The records of a split with each of their texts as ids, the end token at its end; `limit`: the first so many."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(tokenizer)
    backend.encode_special_tokens = True
    records = list(read_lines(path))[:limit]
    names = list(records[0])
    columns = [backend.encode_batch_fast([r[name] for r in records], add_special_tokens=False) for name in names]
    for row in zip(*columns, strict=True):
        yield {name: [*encoding.ids, eos] for name, encoding in zip(names, row, strict=True)}


def rows_of(samples: Iterator[dict[str, list[int]]], length: int) -> Iterator[list[int]]:
    """All texts one after the other, cut into rows of `length`; what is left over is dropped."""
    row: list[int] = []
    for sample in samples:
        row += sample["text"]
        while len(row) >= length:
            yield row[:length]
            row = row[length:]


def batches_by_length(texts: list[str], size: int) -> Iterator[list[int]]:
    """Places of texts of similar length, `size` at a time, shortest first."""
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    for start in range(0, len(order), size):
        yield order[start : start + size]
