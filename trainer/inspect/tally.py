"""One pass over a source, as training reads and encodes it, and what it counts."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.build import build
from trainer.config import Config
from trainer.data.corpus import Corpus
from trainer.data.reader import BAD_RECORD, Drawn, Encoder, Rejected, ShardSequence
from trainer.data.sources import column
from trainer.data.stages.duplicates import ExactDuplicates
from trainer.inspect.figures import Counts, Example, Field, Rejection, SourceFigures
from trainer.tasks import BadRecord, Encoded, PacksRows, Record, Task

if TYPE_CHECKING:
    from trainer.data.tokenizer import Tokenizer

_PART = 512
"""Records that are read and encoded at once."""

_NUM_PLACES = 3
"""Places that are told of each reason."""

_OVERLONG = " tokens are more than "
"""In the reason for every record that `trainer.tasks.text.limit_length` refuses."""

Advance = Callable[[int], None]
"""Told how many records were read."""

WHAT = ("lengths", "labels", "shapes")
"""What is counted of the samples: tokens on each side, single whole numbers, shapes of what is no text."""

Values = dict[str, Counter[Any]]
"""Samples by value, by name."""


class Tally:
    """One pass over a source, and what it counts."""

    def __init__(self, config: Config, corpus: Corpus, name: str, tokenizer: Tokenizer | None, num_shown: int) -> None:
        options = corpus.data.sources[name]
        self._name, self._path = name, corpus.data.datasets[name].path
        self._task, self._stages = corpus.tasks[name], corpus.stages[name]
        self._source = corpus.data.datasets[name].source("train")
        self._prefix = f"{name}/" if name else ""
        self._tokenizer = tokenizer
        self._num_shown = num_shown
        part = {**config.task, **options.task}
        self._refusing: Task | None = None
        """Refuses what the task silently cuts."""
        if part.get("overlong") == "truncate":
            self._refusing = build({**part, "overlong": "skip"}, "task", tokenizer=tokenizer)
        self._complete = False
        self._numbers: Counter[str] = Counter()
        self._seconds = 0.0
        self._rejections: dict[tuple[str, str], list[Any]] = {}
        self._changed: Counter[str] = Counter()
        self._examples: list[Example] = []
        self.values: dict[str, Values] = {what: {} for what in WHAT}

    def read(self, max_records: int | None, advance: Advance) -> SourceFigures:
        """Do it, once."""
        columns = self._task.required_columns
        copies = ExactDuplicates(columns).survey(
            (id, _as_texts(record, columns)) for id, record in self._pass(max_records or sys.maxsize, advance)
        )
        rejections = [Rejection(*key, count, first) for key, (count, first) in self._rejections.items()]
        removed = {stage.name: 0 for stage in self._stages}
        for one in rejections:
            if one.stage != BAD_RECORD:
                removed[one.stage] += one.count
        numbers = self._numbers
        counts = Counts(
            records=numbers["records"],
            samples=numbers["samples"],
            target_tokens=numbers["target_tokens"],
            bad=sum(one.count for one in rejections if one.stage == BAD_RECORD),
            removed=sum(removed.values()),
            duplicates=sum(map(len, copies.values())),
            overlong=numbers["overlong"],
            seconds=self._seconds,
        )
        shards = list(self._source.shards)
        changed = dict(self._changed)
        return SourceFigures(
            self._name, self._path, shards, self._complete, counts, removed, changed, rejections, self._examples
        )

    def _pass(self, max_records: int, advance: Advance) -> Iterator[tuple[str, Record]]:
        """The records in the order of the files, each counted, with their ids."""
        encoder = Encoder(0, self._prefix, self._source, self._task, self._stages, 1.0, None)
        sequence = ShardSequence(self._source, lambda epoch: range(len(self._source.shards)))
        place = 0, 0, 0
        while not self._complete and (left := max_records - self._numbers["records"]):
            start = time.perf_counter()
            rows, place = sequence.take(place, min(_PART, left))
            drawn = encoder.collect(encoder.submit(rows))
            self._seconds += time.perf_counter() - start
            self._complete = place[0] > 0
            advance(len(rows))
            self._count(drawn)
            self._numbers["records"] += len(rows)
            records = {
                f"{self._prefix}{self._source.shards[row.shard]}:{row.offset}": row.record
                for row in rows
                if not isinstance(row.record, BadRecord)
            }
            if self._refusing is not None:
                refused = self._refusing.encode(list(records.values()))
                self._numbers["overlong"] += sum(
                    isinstance(one, BadRecord) and _OVERLONG in one.reason for one in refused
                )
            self._keep_examples(records, drawn)
            yield from records.items()

    def _count(self, drawn: Sequence[Drawn]) -> None:
        for one in drawn:
            self._changed.update(one.changed)
            for rejected in one.rejected:
                self._reject(rejected)
            self._numbers["overlong"] += len(one.samples) > 1
            for sample in one.samples:
                self._numbers["samples"] += 1
                self._numbers["target_tokens"] += sample.encoded.num_target_tokens
                for what, name, value in values_of(self._task, sample.encoded):
                    self.values[what].setdefault(name, Counter())[value] += 1

    def _reject(self, rejected: Rejected) -> None:
        reason = re.sub(r"(?<![=\w])\d+", "N", rejected.reason)
        found = self._rejections.setdefault((rejected.stage, reason), [0, []])
        found[0] += 1
        if len(found[1]) < _NUM_PLACES:
            found[1].append(f"{rejected.shard}:{rejected.offset}: {rejected.reason}")
        self._numbers["overlong"] += rejected.stage == BAD_RECORD and _OVERLONG in rejected.reason

    def _keep_examples(self, records: Mapping[str, Record], drawn: Sequence[Drawn]) -> None:
        samples = (one.samples[0] for one in drawn if one.samples)
        for sample in samples:
            if len(self._examples) == self._num_shown:
                return
            shown = show_fields(sample.encoded, self._tokenizer)
            self._examples.append(Example(sample.id, shown, dict(records[sample.id])))


def _as_texts(record: Record, columns: Sequence[str]) -> Record:
    """The columns that are there, as texts, for a comparison."""
    texts = {}
    for path in columns:
        try:
            value = column(record, path)
        except KeyError:
            continue
        if value is not None:
            texts[path] = str(value.tolist() if isinstance(value, np.ndarray) else value)
    return texts


def _is_text(array: np.ndarray[Any, Any]) -> bool:
    return array.ndim == 1 and array.dtype == np.int32  # the contract of `Encoded`


def sides(task: Task, encoded: Encoded) -> dict[str, int]:
    """Tokens on each side: source and target, or text."""
    texts = {name: len(array) for name, array in encoded.fields.items() if _is_text(array)}
    names = [name.removesuffix("ids").removesuffix("_") or "text" for name in texts]
    return dict(zip(names, task.sides(encoded) if isinstance(task, PacksRows) else texts.values(), strict=False))


def values_of(task: Task, encoded: Encoded) -> Iterator[tuple[str, str, Any]]:
    """(one of WHAT, name, value) of a sample."""
    for side, length in sides(task, encoded).items():
        yield "lengths", side, length
    for name, array in encoded.fields.items():
        if not _is_text(array):
            yield "shapes", name, array.shape
            if array.size == 1 and array.dtype.kind in "iu":
                yield "labels", name, int(array.item())


def show_fields(encoded: Encoded, tokenizer: Tokenizer | None) -> list[Field]:
    """The arrays of a sample, for people."""
    return [_field(name, array, tokenizer) for name, array in encoded.fields.items()]


def _field(name: str, array: np.ndarray[Any, Any], tokenizer: Tokenizer | None) -> Field:
    if tokenizer is None or not _is_text(array):
        text = str(array.item()) if array.size == 1 else f"{array.dtype} from {array.min():g} to {array.max():g}"
        return Field(name, list(array.shape), [], [], text)
    ids = array.tolist()
    return Field(name, list(array.shape), ids, _pieces(ids, tokenizer), tokenizer.decode(ids))


def _pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each token; a character that takes several tokens is the last one's."""
    special = {tokenizer.pad_id: "<pad>", tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    pieces: list[str] = []
    begin = 0
    for end, id in enumerate(ids, start=1):
        piece = special.get(id) or tokenizer.decode(ids[begin:end]) or tokenizer.token_of(id)
        unfinished = piece.endswith("\ufffd") and end < len(ids)
        pieces.append("" if unfinished else piece)
        begin = begin if unfinished else end
    return pieces
