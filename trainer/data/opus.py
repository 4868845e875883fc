"""The tokenizers of OPUS-MT's Marian models: a sentencepiece model for sources, one for targets, and the vocabulary of
both (source.spm, target.spm, vocab.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.data.tokenizer import PairedTokenizer
from trainer.errors import DataError, SetupError

SOURCE, TARGET, VOCABULARY = "source.spm", "target.spm", "vocab.json"
_NORMAL, _USER_DEFINED = 1, 4
"""Types of pieces that a text is cut into, in sentencepiece's model."""
_CHARACTER, _FOREIGN = -5e4, -1e5
"""Scores of pieces that only the other side's model has: taken where nothing else fits, characters first. Marian looks
what its model does not know up in the vocabulary, too."""


def is_pair(folder: Path) -> bool:
    """Whether a folder has these files, and no tokenizer.json."""
    return (
        all((folder / name).is_file() for name in (SOURCE, TARGET, VOCABULARY))
        and not (folder / "tokenizer.json").is_file()
    )


def vocabulary(folder: Path) -> dict[str, int]:
    """Names and ids of all entries. Raises DataError where there is none."""
    path = folder / VOCABULARY
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        ids = sorted(found.values())
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as a vocabulary: {error}") from error
    if not ids or ids != list(range(len(ids))) or "<unk>" not in found or "</s>" not in found:
        raise DataError(f"{path}: ids do not count from 0, or there is no <unk> and no </s>.")
    return {str(name): int(id_) for name, id_ in found.items()}


def read_pair(folder: Path) -> PairedTokenizer:
    """The tokenizer of a folder. Raises DataError for a file that is damaged, SetupError without sentencepiece."""
    entries = vocabulary(folder)
    source, target = (_backend(folder / name, entries) for name in (SOURCE, TARGET))
    return PairedTokenizer.of(source, target, len(entries))


def _backend(path: Path, entries: dict[str, int]) -> Any:
    """Unigram (Kudo 2018) by the library `tokenizers`, whose ids are those of `entries`. Pieces of the model that are
    not among these come behind them."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    model = _parsed(path)
    scores = {one.piece: one.score for one in model.pieces if one.type in (_NORMAL, _USER_DEFINED)}
    names = sorted(entries, key=entries.__getitem__)
    ranked = [(name, scores.get(name, _CHARACTER if len(name) == 1 else _FOREIGN)) for name in names]
    ranked += [(name, score) for name, score in scores.items() if name not in entries]
    backend = tokenizers.Tokenizer(models.Unigram(ranked, unk_id=entries["<unk>"]))
    charsmap = model.normalizer_spec.precompiled_charsmap
    backend.normalizer = normalizers.Sequence(
        [
            *([normalizers.Precompiled(charsmap)] if charsmap else []),
            normalizers.Strip(),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens([name for name in ("</s>", "<unk>", "<pad>") if name in entries])
    codes = [name for name in names if name.startswith(">>") and name.endswith("<<")]  # of the language to write
    backend.add_tokens([tokenizers.AddedToken(code, normalized=False) for code in codes])
    return backend


def _parsed(path: Path) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise SetupError(f"Reading {path} needs sentencepiece and protobuf; install shardwright[hf].") from error
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError, which is of another module in each of its builds
        raise DataError(f"{path}: cannot be read as a sentencepiece model: {error}") from error
    if not model.pieces or model.trainer_spec.model_type != model.trainer_spec.UNIGRAM:
        raise DataError(f"{path}: no unigram model of sentencepiece.")
    return model
