"""Tokenizers: trained on the train split, read from a file or hub, or plain bytes; all by the `tokenizers` library.

A run keeps its tokenizer as one JSON text (`tokenizer.json`), known by its SHA-256. Trained and byte tokenizers work on
bytes: no text is unknown, and `decode(encode(text)) == text`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    import tokenizers

Texts = Callable[[], Iterator[str]]
"""Gives all texts of the train split anew at each call."""

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
"""Padding, begin, end, unknown: ids 0 to 3 of our own tokenizers."""

_PAIR = '{"size": '
"""How the JSON of a `PairedTokenizer` begins."""

_KNOWN = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>"),
    "bos": ("<s>", "<bos>", "[CLS]", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "eos": ("</s>", "<eos>", "[SEP]", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>"),
    "unk": ("<unk>", "[UNK]", "<|unk|>"),
    "mask": ("<mask>", "[MASK]", "<|mask|>"),
}
"""Names by which other people's tokenizers call their special tokens, in order of preference."""


def _library() -> Any:
    """`tokenizers`, told to use this process's share of the cores, and not to warn when the process forks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    import tokenizers

    return tokenizers


class Tokenizer:
    """Texts to ids and back. `pad_id`, `bos_id`, `eos_id`, `unk_id` are ids of the vocabulary; some may be the same.

    `mask_id` is None where the tokenizer has no token for what is masked; `special_tokens`: names and ids of all tokens
    that no text contains.
    """

    def __init__(self, backend: tokenizers.Tokenizer, text: str | None = None) -> None:
        """`text`: the JSON that `backend` was read from, None = ask it.

        Raises DataError where the special tokens cannot be told by their names.
        """
        self._json: str = backend.to_str() if text is None else text
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # "</s>" in a text is five characters, not the end
        self._backend = backend
        found = {
            role: next((id for name in names if (id := backend.token_to_id(name)) is not None), None)
            for role, names in _KNOWN.items()
        }
        eos = found["eos"]
        if eos is None:
            raise DataError(
                f"The tokenizer has no token for the end of a text; one of {', '.join(_KNOWN['eos'])} is needed."
            )
        self.eos_id = eos
        self.pad_id = eos if found["pad"] is None else found["pad"]
        self.bos_id = self.pad_id if found["bos"] is None else found["bos"]
        self.mask_id = found["mask"]
        self.unk_id = self.pad_id if found["unk"] is None else found["unk"]
        self.special_tokens = {
            token.content: id for id, token in backend.get_added_tokens_decoder().items() if token.special
        }
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; no special tokens are added, and none are recognised in the text."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def decode_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """`decode` of each."""
        return list(self._backend.decode_batch([list(row) for row in ids], skip_special_tokens=True))

    def token_of(self, id_: int) -> str:
        """The name of an entry of the vocabulary."""
        return str(self._backend.id_to_token(id_))

    def id_of(self, token: str) -> int | None:
        """The id of an entry of the vocabulary by its name; None where there is none."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def entries(self) -> dict[str, int]:
        """The vocabulary: names and ids."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    def between_ends(self) -> Tokenizer:
        """The same, made to add special tokens for those who let it: begin token, text, end token, and a second text
        and its end. One that adds some already stays what it is."""
        backend = _library().Tokenizer.from_str(self.source_json)
        if backend.post_processor is None:
            bos, eos = self.token_of(self.bos_id), self.token_of(self.eos_id)
            ends = [(bos, self.bos_id), (eos, self.eos_id)]
            template = _library().processors.TemplateProcessing
            backend.post_processor = template(f"{bos} $A {eos}", f"{bos} $A {eos} $B:1 {eos}:1", ends)
        return Tokenizer.from_json(backend.to_str())

    def to_json(self) -> str:
        """The whole tokenizer; `from_json` reads it back. The very text it was read from, if it was."""
        return self._json

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The tokenizer that `to_json` wrote. Raises DataError where `text` is none."""
        if text.startswith(_PAIR):
            return PairedTokenizer(text)
        try:
            return cls(_library().Tokenizer.from_str(text), text)
        except DataError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"This is not a tokenizer.json: {error}") from error

    def __reduce__(self) -> tuple[Callable[[str], Tokenizer], tuple[str]]:
        """To another process: the backend's own pickle forgets some settings."""
        return Tokenizer.from_json, (self._json,)

    @property
    def for_targets(self) -> Tokenizer:
        """What encodes targets, where that differs; the same ids mean the same."""
        return self

    @property
    def source_json(self) -> str:
        """The tokenizer.json of what encodes sources, as the library `tokenizers` reads it."""
        return self._json

    @property
    def sha256(self) -> str:
        """SHA-256 of `to_json()` in UTF-8, which is also that of the file `save` writes."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, path: Path | str) -> None:
        """Write tokenizer.json."""
        Path(path).write_text(self.to_json(), encoding="utf-8", newline="")


class PairedTokenizer(Tokenizer):
    """Two that share a vocabulary: this one for sources, `for_targets` for targets, which also decodes."""

    def __init__(self, text: str) -> None:
        """`text`: what `of` made one of. Raises DataError where it is damaged."""
        try:
            parts = json.loads(text)
            backends = [_library().Tokenizer.from_str(json.dumps(parts[side])) for side in ("source", "target")]
            size = int(parts["size"])
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"This is not a pair of tokenizers: {error}") from error
        super().__init__(backends[0], text)
        self.vocab_size = size
        self._target = _Side(backends[1], size)

    @classmethod
    def of(cls, source: Any, target: Any, size: int) -> PairedTokenizer:
        """Of two backends; size: of the vocabulary. Pieces with ids from there on are unknown."""
        sides = f'"source": {source.to_str()}, "target": {target.to_str()}'
        return cls(f"{_PAIR}{size}, {sides}}}")

    @property
    def for_targets(self) -> Tokenizer:
        """See `Tokenizer`."""
        return self._target

    @property
    def source_json(self) -> str:
        """See `Tokenizer`; without the pieces that are unknown."""
        side = json.loads(self.to_json())["source"]
        side["model"]["vocab"] = side["model"]["vocab"][: self.vocab_size]
        return json.dumps(side, ensure_ascii=False)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`."""
        return _known(super().encode_batch(texts), self.vocab_size, self.unk_id)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return self._target.decode(ids)

    def decode_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """See `Tokenizer`."""
        return self._target.decode_batch(ids)

    def entries(self) -> dict[str, int]:
        """See `Tokenizer`."""
        return {name: id_ for name, id_ in super().entries().items() if id_ < self.vocab_size}


class _Side(Tokenizer):
    """That of the targets."""

    def __init__(self, backend: tokenizers.Tokenizer, size: int) -> None:
        super().__init__(backend)
        self.vocab_size = size

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return _known(super().encode_batch(texts), self.vocab_size, self.unk_id)


def _known(rows: list[list[int]], size: int, unk_id: int) -> list[list[int]]:
    return [[id_ if id_ < size else unk_id for id_ in row] for row in rows]


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a tokenizer.json. Raises DataError where it is missing or damaged."""
    try:
        text = Path(path).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a tokenizer.json: {error}") from error
    try:
        return Tokenizer.from_json(text)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


class TrainedTokenizer:
    """Sub-words learnt from the train split: byte-level BPE (Sennrich et al. 2016) or unigram (Kudo 2018)."""

    def __init__(
        self,
        kind: Literal["bpe", "unigram"] = "bpe",
        vocab_size: int = 8000,
        lowercase: bool = False,
        max_records: int | None = None,
        special_tokens: Sequence[str] = (),
    ) -> None:
        """`vocab_size`: at most so many entries; `max_records`: texts to learn from, None = all; `special_tokens`:
        further ones, see `spelled_out`. Raises ConfigError."""
        if kind not in ("bpe", "unigram"):
            raise ConfigError(f"tokenizer.kind={kind} is not known; use bpe or unigram.")
        self._special_tokens = spelled_out(special_tokens)
        _check_vocab_size(vocab_size, self._special_tokens)
        self._kind = kind
        self._vocab_size = vocab_size
        self._lowercase = lowercase
        self._max_records = max_records

    def prepare(self, texts: Texts) -> Tokenizer:
        """Train."""
        library = _library()
        unigram = self._kind == "unigram"
        backend = library.Tokenizer(library.models.Unigram() if unigram else library.models.BPE())
        _work_on_bytes(backend, split_words=True)
        if self._lowercase:
            backend.normalizer = library.normalizers.Lowercase()
        options = {
            "vocab_size": self._vocab_size,
            "special_tokens": [*_SPECIAL, *self._special_tokens],
            "initial_alphabet": sorted(library.pre_tokenizers.ByteLevel.alphabet()),
            "show_progress": False,
        }
        trainers = library.trainers
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options) if unigram else trainers.BpeTrainer(**options)
        backend.train_from_iterator(islice(texts(), self._max_records), trainer)
        return Tokenizer.from_json(backend.to_str())


class ByteTokenizer:
    """Every byte of UTF-8 is a token: ids 4 to 259; further special tokens (see `spelled_out`) come after them."""

    def __init__(self, vocab_size: int = 4 + 256, special_tokens: Sequence[str] = ()) -> None:
        """Raises ConfigError where `vocab_size` is too small for all bytes and special tokens."""
        self._special_tokens = spelled_out(special_tokens)
        _check_vocab_size(vocab_size, self._special_tokens)

    def prepare(self, texts: Texts) -> Tokenizer:
        """The tokenizer; `texts` has no part in it."""
        library = _library()
        alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: id for id, token in enumerate((*_SPECIAL, *alphabet))}
        backend = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=[]))
        _work_on_bytes(backend, split_words=False)
        backend.add_special_tokens([*_SPECIAL, *self._special_tokens])
        return Tokenizer(backend)


class FileTokenizer:
    """A tokenizer that exists: a tokenizer.json, a folder that holds one, or the name of a model on the hub."""

    def __init__(self, path: str, vocab_size: int | None = None, special_tokens: Sequence[str] = ()) -> None:
        """`vocab_size`: entries it may have at most, for the model is built for so many; None = any; `special_tokens`:
        those it gets where it has no such token (see `spelled_out`), behind all its entries."""
        self._path = path
        self._vocab_size = vocab_size
        self._special_tokens = spelled_out(special_tokens)

    def prepare(self, texts: Texts) -> Tokenizer:
        """Read it; `texts` has no part in it. Raises DataError if there is none, ConfigError if it is too large."""
        local = Path(self._path).expanduser()
        if local.is_dir():
            from trainer.data import opus  # which imports this module

            if opus.is_pair(local):
                return self._checked(opus.read_pair(local))
        local = local / "tokenizer.json" if local.is_dir() else local
        if local.exists() or local.suffix == ".json":
            tokenizer = load_tokenizer(local)
        else:
            try:
                tokenizer = Tokenizer(_library().Tokenizer.from_pretrained(self._path))
            except DataError:
                raise
            except Exception as error:  # the library raises bare Exception
                raise DataError(
                    f"tokenizer.path={self._path}: neither a file, nor a model whose tokenizer the hub could serve:"
                    f" {error}"
                ) from error
        if self._special_tokens:
            backend = _library().Tokenizer.from_str(tokenizer.to_json())
            backend.add_special_tokens(self._special_tokens)
            tokenizer = Tokenizer(backend)
        return self._checked(tokenizer)

    def _checked(self, tokenizer: Tokenizer) -> Tokenizer:
        if self._vocab_size is not None and tokenizer.vocab_size > self._vocab_size:
            raise ConfigError(
                f"tokenizer.path={self._path} has {tokenizer.vocab_size} entries,"
                f" tokenizer.vocab_size={self._vocab_size} is fewer;"
                f" set tokenizer.vocab_size={tokenizer.vocab_size} or more."
            )
        return tokenizer


def spelled_out(names: Sequence[str]) -> list[str]:
    """Names of special tokens, {0..99} in one of them standing for each of these numbers: "<extra_id_{0..99}>" names a
    hundred. Raises ConfigError for a name that is no text, occurs twice or is one of our own."""
    found: list[str] = []
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(f"tokenizer.special_tokens: {name!r} is no name of a token.")
        numbers = re.search(r"\{(\d+)\.\.(\d+)\}", name)
        if numbers is None:
            found.append(name)
        else:
            first, last = map(int, numbers.groups())
            found += [f"{name[: numbers.start()]}{number}{name[numbers.end() :]}" for number in range(first, last + 1)]
    twice = sorted(name for name, count in Counter([*_SPECIAL, *found]).items() if count > 1)
    if twice:
        raise ConfigError(f"tokenizer.special_tokens: {', '.join(twice)} would be there twice; name each once.")
    return found


def _check_vocab_size(vocab_size: int, special_tokens: Sequence[str]) -> None:
    special = len(_SPECIAL) + len(special_tokens)
    if vocab_size < special + 256:
        raise ConfigError(
            f"tokenizer.vocab_size={vocab_size} is too small:"
            f" 256 bytes and {special} special tokens need {special + 256}."
        )


def _work_on_bytes(backend: Any, split_words: bool) -> None:
    """Bytes stand for characters, as in GPT-2; pieces then never cross the borders of words, if `split_words`."""
    library = _library()
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    backend.decoder = library.decoders.ByteLevel()
