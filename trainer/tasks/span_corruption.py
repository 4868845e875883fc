"""Span corruption (T5, Raffel et al. 2020, sections 3.1.4 and 3.3.4) and UL2's mixture of it (Tay et al. 2022).

Spans of a text are cut out; the encoder reads the rest with a sentinel in the place of each, the decoder writes the
sentinels, each followed by its span. How long both become is known before anything is drawn, so texts are joined and
cut into segments that give inputs and targets of exactly one length. Unlike T5's own code, in which a text begins with
what is kept and ends with a span, spans lie anywhere.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, chain
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trainer.errors import ConfigError
from trainer.tasks import BadRecord, Encoded, Record
from trainer.tasks.text import TextTokenizer, text_at
from trainer.tasks.text_to_text import SourceToTarget
from trainer.wording import did_you_mean

Ids = npt.NDArray[np.int32]


class SpecialTokenizer(TextTokenizer, Protocol):
    """A tokenizer that knows special tokens by name (`tokenizer.special_tokens`)."""

    def id_of(self, token: str) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Denoiser:
    """How a segment is corrupted.

    noise_density: share of its tokens that are cut out; mean_span_length: tokens of a span, None = one span at the end
    (a prefix is continued); mode: the token that the input begins with, None = none; weight: share of the segments.
    """

    noise_density: float
    mean_span_length: float | None
    mode: str | None = None
    weight: float = 1.0

    def noise(self, raw_length: int) -> tuple[int, int]:
        """(tokens, spans) that are cut out of `raw_length` tokens: at least one of each, and fewer than all tokens."""
        tokens = min(max(_nearest(raw_length * self.noise_density), 1), raw_length - 1)
        if self.mean_span_length is None:
            return tokens, 1
        return tokens, min(max(_nearest(tokens / self.mean_span_length), 1), raw_length - tokens)

    def lengths(self, raw_length: int) -> tuple[int, int]:
        """Tokens of the input and of the target: a sentinel for each span, the end token, and the mode in the input."""
        tokens, spans = self.noise(raw_length)
        return raw_length - tokens + spans + 1 + (self.mode is not None), tokens + spans + 1

    def raw_length(self, input_length: int) -> int:
        """The most tokens that give an input of at most `input_length`, and of exactly that while spans are fewer than
        the tokens between them.

        Of a raw length n about n (1 - density + density / span length) tokens are input. One token more of text is one
        more of the input or, where rounding counts it to the noise, none, but for the sentinel of a span it begins; so
        inputs grow in steps of 0 and 1, and no length is left out. The search goes down from just above the quotient.
        """
        spans_per_token = self.noise_density / self.mean_span_length if self.mean_span_length else 0.0
        raw = int((input_length + 2) / (1 - self.noise_density + spans_per_token)) + 2
        while raw > 2 and self.lengths(raw)[0] > input_length:
            raw -= 1
        return raw


def _nearest(value: float) -> int:
    return int(value + 0.5)  # a half always up, unlike round(): so steps stay 0 and 1


class SpanCorruption(SourceToTarget):
    """Cross-entropy of the spans that were cut out; evaluated by loss and accuracy.

    input_length: tokens that the encoder reads, all of them real. denoisers: mappings of the fields of `Denoiser`, of
    which each segment gets one by weight. sentinel: their names, {} for the number. seed: of the spans. What becomes of
    a segment is a function of its tokens and `seed`; what the segments are, of the block of records they are cut from.
    A block's last segment goes on with the block's beginning, so that nothing is left over and nothing padded.
    """

    def __init__(
        self,
        tokenizer: SpecialTokenizer,
        text_column: str,
        input_length: int,
        denoisers: Sequence[Mapping[str, Any]],
        sentinel: str = "<extra_id_{}>",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Raises ConfigError for options that cannot be, and tokens that the tokenizer does not have."""
        super().__init__(tokenizer, label_smoothing, z_loss)
        if input_length < 5:
            raise ConfigError(f"task.input_length={input_length}: use at least 5.")
        if "{}" not in sentinel:
            raise ConfigError(f"task.sentinel={sentinel} must hold {{}}, where the number of the sentinel stands.")
        self._denoisers = _checked(denoisers)
        self._raw_lengths = [one.raw_length(input_length) for one in self._denoisers]
        lengths, spans = [], []
        for index, (one, raw) in enumerate(zip(self._denoisers, self._raw_lengths, strict=True)):
            lengths.append(one.lengths(raw))
            spans.append(one.noise(raw)[1])
            if lengths[-1][0] != input_length:
                raise ConfigError(
                    f"task.denoisers.{index}: inputs of exactly {input_length} tokens cannot come of noise_density="
                    f"{one.noise_density} in spans of {one.mean_span_length}; lower the density or lengthen the spans."
                )
        self._sentinels = _ids_of(tokenizer, [sentinel.format(number) for number in range(max(spans))], sentinel)
        modes = [[one.mode] if one.mode else [] for one in self._denoisers]
        self._modes = [np.asarray(_ids_of(tokenizer, names), np.int32) for names in modes]
        self._shares = list(accumulate(one.weight for one in self._denoisers))
        self.required_columns: Sequence[str] = (text_column,)
        self.max_length = max(map(max, lengths))
        self._text_column = text_column
        self._seed = seed

    def encode(self, records: Sequence[Record]) -> list[Encoded | BadRecord]:
        """`ids` int32: the text and the end token, to be joined."""
        texts = [text_at(record, self._text_column) for record in records]
        ids = iter(self._tokenizer.encode_batch([text for text in texts if isinstance(text, str)]))
        return [text if isinstance(text, BadRecord) else self._encoded(next(ids)) for text in texts]

    def _encoded(self, ids: list[int]) -> Encoded:
        whole = np.asarray([*ids, self._tokenizer.eos_id], np.int32)
        return Encoded({"ids": whole}, length=len(whole), num_target_tokens=len(whole))

    def pieces(self, sample: Encoded) -> list[Encoded]:
        """Itself: what is cut is what was joined."""
        return [sample]

    def join(self, samples: Sequence[Encoded]) -> list[Encoded]:
        """`source_ids`, `target_ids` int32: the corrupted segments of all texts one after the other."""
        ids: Ids = np.concatenate([sample.fields["ids"] for sample in samples])
        joined: list[Encoded] = []
        place = 0
        while place < len(ids):
            window: Ids = np.take(ids, range(place, place + max(self._raw_lengths)), mode="wrap")
            chosen = self._choose(window[: min(self._raw_lengths)])
            place += self._raw_lengths[chosen]
            joined.append(self._corrupt(window[: self._raw_lengths[chosen]], chosen))
        return joined

    def _choose(self, ids: Ids) -> int:
        """The denoiser of a segment that begins with `ids`."""
        share = (int(_random_words(ids, self._seed).random_raw()) >> 11) / 2**53
        return bisect_right(self._shares, share * self._shares[-1])

    def _corrupt(self, ids: Ids, chosen: int) -> Encoded:
        """Input and target of a segment."""
        num_cut, spans = self._denoisers[chosen].noise(len(ids))
        num_kept = len(ids) - num_cut
        words = _random_words(ids, self._seed)
        cut = random_parts(num_cut, spans, words)
        if self._denoisers[chosen].mean_span_length is None:
            kept = np.asarray([num_kept, 0])
        else:  # a token at least between two spans, perhaps none before the first and after the last
            kept = random_parts(num_kept + 2, spans + 1, words)
            kept[[0, -1]] -= 1
        sizes = np.stack([kept[:-1], cut], axis=1).reshape(-1)
        parts = np.split(ids, np.cumsum(sizes))  # kept, cut, kept, cut ... kept
        sentinels = [np.asarray([one]) for one in self._sentinels[:spans]]
        end = np.asarray([self._tokenizer.eos_id])
        source = [self._modes[chosen], *chain.from_iterable(zip(parts[:-1:2], sentinels, strict=True)), parts[-1], end]
        target = [*chain.from_iterable(zip(sentinels, parts[1::2], strict=True)), end]
        source_ids, target_ids = (np.concatenate(side).astype(np.int32) for side in (source, target))
        fields = {"source_ids": source_ids, "target_ids": target_ids}
        return Encoded(fields, length=max(len(source_ids), len(target_ids)), num_target_tokens=len(target_ids))

    def target_bytes(self, record: Record, sample: Encoded) -> int:
        """0: sentinels are predicted too, so bits per byte would mean little."""
        return 0


def random_parts(total: int, count: int, words: np.random.PCG64) -> npt.NDArray[np.int64]:
    """`count` positive numbers that sum to `total`, every such sequence equally likely: int64 [count].

    The borders are drawn out of the total - 1 places between two tokens.
    """
    borders = np.sort(np.argsort(words.random_raw(total - 1), kind="stable")[: count - 1]) + 1
    return np.diff(borders, prepend=0, append=total).astype(np.int64)


def _random_words(ids: Ids, seed: int) -> np.random.PCG64:
    """Random 64-bit words, a function of the tokens and the seed alone on every machine and numpy (see
    `trainer.data.order`)."""
    digest = hashlib.sha256(f"{seed} ".encode() + ids.astype("<i4").tobytes()).digest()
    return np.random.PCG64(np.random.SeedSequence(int.from_bytes(digest, "little")))


def _ids_of(tokenizer: SpecialTokenizer, names: Sequence[str], sentinel: str = "") -> list[int]:
    """The ids of special tokens, which are `sentinel` with the numbers from 0 on where that is given. Raises
    ConfigError with what is missing."""
    ids = [id_ for name in names if (id_ := tokenizer.id_of(name)) is not None]
    if len(ids) < len(names):
        wanted = sentinel.format(f"{{0..{len(names) - 1}}}") if sentinel else names[0]
        raise ConfigError(
            f"task.denoisers need {len(names)} tokens that the tokenizer does not have:"
            f' tokenizer.special_tokens=["{wanted}"], beside others.'
        )
    return ids


def _checked(denoisers: Sequence[Mapping[str, Any]]) -> list[Denoiser]:
    """Raises ConfigError with everything that is wrong with the denoisers."""
    known = [field.name for field in fields(Denoiser)]
    problems = [] if denoisers else ["task.denoisers is empty; T5 has [{noise_density: 0.15, mean_span_length: 3}]."]
    for index, given in enumerate(denoisers):
        key = f"task.denoisers.{index}"
        problems += [f"{key}.{name} is not known{did_you_mean(name, known)}" for name in given if name not in known]
        problems += [f"{key}.{name} is missing." for name in known[:2] if name not in given]
        numbers = {
            "noise_density": (0 < _number(given, "noise_density", 0.5) < 1, "a number between 0 and 1"),
            "mean_span_length": (_number(given, "mean_span_length", 1) >= 1, "a number of at least 1, or null"),
            "weight": (_number(given, "weight", 1) >= 0, "a number of 0 or more"),
        }
        problems += [
            f"{key}.{name}={given[name]!r} must be {wanted}." for name, (fits, wanted) in numbers.items() if not fits
        ]
        if not isinstance(given.get("mode") or "", str):
            problems.append(f"{key}.mode={given['mode']!r} is not the name of a token or null.")
    if problems:
        raise ConfigError(*problems)
    found = [Denoiser(**given) for given in denoisers]
    if not any(one.weight for one in found):
        raise ConfigError("task.denoisers: all weights are 0; raise one.")
    return found


def _number(given: Mapping[str, Any], name: str, default: float) -> float:
    """The number of that name, `default` for none or null, or one that no limits admit."""
    value = given.get(name)
    return default if value is None else value if isinstance(value, int | float) else float("nan")
