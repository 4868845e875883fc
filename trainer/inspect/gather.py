"""Reads an experiment's data as training would: the figures of it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from trainer.build import build
from trainer.config import Config, config_from_yaml, differences
from trainer.data.corpus import Corpus, Stream
from trainer.data.dealers import make_dealers
from trainer.data.lanes import Lane
from trainer.data.loader import Loader
from trainer.data.reader import Encoder
from trainer.errors import DataError
from trainer.inspect.figures import Batches, Counts, Example, Figures, Lengths, ShownRow
from trainer.inspect.tally import WHAT, Advance, Tally, Values, show_fields, sides
from trainer.parts import make_corpus, make_task, make_tokenizer
from trainer.plan import make_plan
from trainer.run_directory import RunDirectory
from trainer.tasks import Task

if TYPE_CHECKING:
    from trainer.data.tokenizer import Tokenizer


def gather(config: Config, num_shown: int, max_records: int | None, max_steps: int) -> Figures:
    """num_shown: records, samples and rows to keep; max_records: of each source; max_steps: whose padding is counted.

    Raises what training would raise before its first step.
    """
    with _warnings() as warnings:
        directory = RunDirectory.of(config)
        warnings += _differing_run(config, directory)
        data = build(config.data, "data")
        config, tokenizer = make_tokenizer(config, data, directory)
        task = make_task(config, tokenizer)
        corpus = make_corpus(config, data, tokenizer, task)
        corpus.check("train")
        make_stream = partial(Stream, corpus, config.seed, config.batch.global_size, config.stop.epochs)
        stream = make_stream()  # refuses, before the pass, what does not fit
        tallies = [Tally(config, corpus, name, tokenizer, num_shown) for name in data.datasets]
        with _progress(max_records and max_records * len(tallies)) as advance:
            sources = [tally.read(max_records, advance) for tally in tallies]
        rows: list[ShownRow] = []
        batches: Batches | None = None
        try:
            rows = _first_rows(stream, corpus, tokenizer, min(num_shown, config.batch.global_size))
            batches = _first_steps(config, make_stream(), task, max_steps)
        except DataError as error:
            warnings.append(f"Training would stop: {error}")
    totals = Counts(*(sum(getattr(one.counts, entry.name) for one in sources) for entry in fields(Counts)))
    lengths, labels, shapes = (_joined([tally.values[what] for tally in tallies]) for what in WHAT)
    whole = all(one.complete for one in sources)
    return Figures(
        tokenizer=_describe(tokenizer, directory),
        lanes=data.lanes,
        stride=stream.stride,
        batching=data.batching,
        row_lengths=list(stream.row_lengths) if stream.row_lengths else None,
        warnings=list(dict.fromkeys(warnings)),
        sources=sources,
        rows=rows,
        lengths=[_lengths(side, counts) for side, counts in lengths.items()],
        labels={name: {str(value): counts[value] for value in sorted(counts)} for name, counts in labels.items()},
        shapes={name: {str(list(shape)): counts[shape] for shape in counts} for name, counts in shapes.items()},
        totals=totals,
        overlong_share=totals.overlong / max(1, totals.records),
        tokens_per_second=totals.target_tokens / totals.seconds,
        epoch_seconds=totals.seconds if whole else None,
        batches=batches,
    )


def _differing_run(config: Config, directory: RunDirectory) -> list[str]:
    """A warning where the run of that name, whose tokenizer is taken, is of another configuration."""
    changed = differences(config_from_yaml(directory.config), config) if directory.config.exists() else []
    if not changed:
        return []
    return [f"{directory.path} is a run of another configuration ({'; '.join(changed)}); give another name=..."]


def _describe(tokenizer: Tokenizer | None, directory: RunDirectory) -> str:
    if tokenizer is None:
        return "none"
    origin = str(directory.tokenizer) if directory.tokenizer.exists() else "made as training would"
    return f"{tokenizer.vocab_size} entries, {origin}"


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """The package's warnings, but for the reader's, of single records, which the figures tell."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name != Encoder.__module__:
                messages.append(record.getMessage())

    logger, handler = logging.getLogger("trainer"), Collector(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


@contextmanager
def _progress(total: int | None) -> Iterator[Advance]:
    """A bar on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = TextColumn("records"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)


def _first_rows(stream: Stream, corpus: Corpus, tokenizer: Tokenizer | None, count: int) -> list[ShownRow]:
    """The first rows of the first global batch."""
    tasks = list(corpus.tasks.values())
    lanes: dict[int, Lane] = {}
    shown = []
    for place in range(count):
        turn, index = divmod(place, stream.stride)
        if index not in lanes:
            lanes[index] = stream.lane(index)
        row = lanes[index].at(turn)
        if row is None:
            break
        used: Counter[str] = Counter()
        for sample in row.samples:
            used.update(sides(tasks[sample.key[0]], sample.encoded))
        shown.append(
            ShownRow([Example(one.id, show_fields(one.encoded, tokenizer)) for one in row.samples], dict(used))
        )
    return shown


def _first_steps(config: Config, stream: Stream, task: Task, max_steps: int) -> Batches:
    """The padding of up to `max_steps` steps, of an epoch at most."""
    dealers = make_dealers(stream, rank=0, world_size=1)
    loader = Loader(dealers, task, make_plan(config, 1), stream.row_lengths)
    steps, samples, epochs, first_padding = 0, 0, 0.0, 0.0
    positions, padding = 0, 0
    try:
        for step in loader:
            if step.exhausted:
                break
            steps, samples, epochs = steps + 1, samples + step.num_samples, step.epoch
            positions, padding = positions + step.num_positions, padding + step.num_padding
            if steps == 1:
                first_padding = padding / max(1, positions)
            if steps == max_steps or epochs >= 1:
                break
    finally:
        loader.close()
    return Batches(steps, epochs, samples, padding / max(1, positions), first_padding)


def _joined(parts: Sequence[Values]) -> Values:
    """The counts of all sources."""
    joined: Values = {}
    for part in parts:
        for name, counts in part.items():
            joined.setdefault(name, Counter()).update(counts)
    return joined


def _lengths(side: str, counts: Counter[int]) -> Lengths:
    lengths = np.asarray(sorted(counts))
    numbers = np.asarray([counts[length] for length in lengths.tolist()])
    below = np.cumsum(numbers)

    def quantile(share: float) -> int:
        return int(lengths[np.searchsorted(below, share * below[-1])])

    mean = float((lengths * numbers).sum() / below[-1])
    by_length = dict(zip(lengths.tolist(), numbers.tolist(), strict=True))
    return Lengths(side, mean, quantile(0.5), quantile(0.95), int(lengths[-1]), by_length)
