"""Stages that leave records out for what they are: too short, too long, unequal sides, another language."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.data.stages import Changed, Removed, check_columns, require, text_of
from trainer.errors import ConfigError
from trainer.tasks import Record

_LOOKED_AT = 2000
"""Characters by which a language is told: enough to be sure, and a book costs no more than a page."""


class Length:
    """Leaves out records whose column has fewer or more characters than it should."""

    name = "length"

    def __init__(self, column: str, min_characters: int = 1, max_characters: int | None = None) -> None:
        """`column`: dotted path; characters are counted without white space at the ends. Raises ConfigError."""
        if min_characters < 0:
            raise ConfigError(f"Length: min_characters={min_characters} must not be negative; use 0 for any.")
        if max_characters is not None and max_characters < max(1, min_characters):
            raise ConfigError(
                f"Length: max_characters={max_characters} leaves nothing (min_characters={min_characters});"
                " raise it, or use null for any."
            )
        self._column = column
        self._min = min_characters
        self._max = max_characters

    def apply(self, ids: Sequence[str], records: Sequence[Record]) -> list[Record | Changed | Removed]:
        """See `Stage`."""
        return [self._judge(record) for record in records]

    def _judge(self, record: Record) -> Record | Removed:
        text = text_of(record, self._column)
        if text is None:
            return record
        length = len(text.strip())
        if length < self._min:
            return Removed(f"{self._column} has {length} characters, fewer than min_characters={self._min}")
        if self._max is not None and length > self._max:
            return Removed(f"{self._column} has {length} characters, more than max_characters={self._max}")
        return record


class LengthRatio:
    """Leaves out pairs of which one side is much longer than the other: rarely translations of each other.

    A pair with one empty side goes, one with two stays (that is for `Length`). Scripts differ: English has some three
    characters for one of Chinese, so allow for it.
    """

    name = "length_ratio"

    def __init__(self, source_column: str, target_column: str, max_ratio: float = 3.0, min_characters: int = 0) -> None:
        """max_ratio: longer side to shorter, in characters; min_characters: a pair stays whose longer side has fewer.

        Raises ConfigError.
        """
        if not max_ratio >= 1:
            raise ConfigError(f"LengthRatio: max_ratio={max_ratio} would leave out equal sides; use 1 or more.")
        if min_characters < 0:
            raise ConfigError(f"LengthRatio: min_characters={min_characters} must not be negative; use 0 for any.")
        check_columns("LengthRatio", (source_column, target_column))
        self._columns = source_column, target_column
        self._max_ratio = max_ratio
        self._min = min_characters

    def apply(self, ids: Sequence[str], records: Sequence[Record]) -> list[Record | Changed | Removed]:
        """See `Stage`."""
        return [self._judge(record) for record in records]

    def _judge(self, record: Record) -> Record | Removed:
        source, target = (text_of(record, path) for path in self._columns)
        if source is None or target is None:
            return record
        lengths = len(source.strip()), len(target.strip())
        longer, shorter = max(lengths), min(lengths)
        if longer < self._min or longer <= self._max_ratio * shorter:
            return record
        sides = " and ".join(f"{path} {length}" for path, length in zip(self._columns, lengths, strict=True))
        return Removed(f"{sides} characters, more than max_ratio={self._max_ratio:g} apart")


class Language:
    """Leaves out records in another language than they should be in (langid.py: Lui and Baldwin 2012).

    The model's probability spreads over 140 languages where a text is short, so what counts is the probability of the
    right language as against the likeliest one, 0.5 where it is the likeliest itself. By the defaults, of the packaged
    texts of a user interface 0.2 % (German) and 0.4 % (English) go; taken for the other language, 92 % and 95 % do.
    """

    name = "language"

    def __init__(
        self,
        columns: Mapping[str, str],
        min_probability: float = 0.1,
        min_characters: int = 20,
        languages: Sequence[str] | None = None,
    ) -> None:
        """Loads the model. Raises ConfigError, or SetupError where py3langid is missing.

        columns: dotted path -> ISO 639 code of its language; min_probability: of that language against the likeliest,
        at most 0.5; min_characters: a text with fewer stays; languages: codes that can occur at all, None = any.
        """
        check_columns("Language", columns)
        if not 0 < min_probability <= 0.5:
            raise ConfigError(
                f"Language: min_probability={min_probability} must be above 0 and at most 0.5, which leaves out"
                " every text that is likelier in another language."
            )
        if min_characters < 0:
            raise ConfigError(f"Language: min_characters={min_characters} must not be negative; use 0 for any.")
        langid = require("py3langid.langid", "py3langid")
        self._model = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
        _check_codes(columns, languages, self._model.labels)
        self._model.set_languages(languages)
        self._columns = dict(columns)
        self._min_probability = min_probability
        self._min = min_characters

    def apply(self, ids: Sequence[str], records: Sequence[Record]) -> list[Record | Changed | Removed]:
        """See `Stage`."""
        rank: Callable[[str], list[tuple[str, float]]] = self._model.rank
        return [self._judge(record, rank) for record in records]

    def _judge(self, record: Record, rank: Callable[[str], list[tuple[str, float]]]) -> Record | Removed:
        for path, language in self._columns.items():
            text = text_of(record, path)
            if text is None or len(text := text.strip()) < self._min:
                continue
            ranked = rank(text[:_LOOKED_AT])
            (likeliest, highest), own = ranked[0], dict(ranked)[language]
            probability = own / (own + highest)
            if probability < self._min_probability:
                return Removed(
                    f"{path} is {language} rather than {likeliest} with probability {probability:.3f},"
                    f" less than min_probability={self._min_probability:g}"
                )
        return record


def _check_codes(columns: Mapping[str, Any], languages: Sequence[Any] | None, known: Sequence[str]) -> None:
    """Raise ConfigError for codes that the model does not know, with YAML's `no` for Norwegian explained."""
    problems = [
        f"Language: {code!r} (of {place}) is no language code; in YAML, quote it: 'no'."
        if isinstance(code, bool)
        else f"Language: {code!r} (of {place}) is not known; use one of {', '.join(sorted(known))}."
        for place, code in (*columns.items(), *(("languages", code) for code in languages or ()))
        if code not in known
    ]
    if not problems and languages is not None:
        problems = [
            f"Language: languages={list(languages)} lacks {code}, the language of {path}; add it."
            for path, code in columns.items()
            if code not in languages
        ]
    if problems:
        raise ConfigError(*problems)
