"""Figures on a terminal, and their lengths as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.errors import SetupError
from trainer.inspect.figures import Example, Field, Figures, Lengths, ShownRow, SourceFigures

_COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")
_BARS, _BAR_WIDTH = 16, 40
_MAX_CHARACTERS, _MAX_TOKENS, _MAX_SHARDS = 400, 60, 3


def show(figures: Figures) -> None:
    """Print all of it on standard output."""
    console = Console(highlight=False)
    _show_sources(console, figures)
    for source in figures.sources:
        console.rule(_titled("Records and samples", source), align="left")
        for example in source.examples:
            _show_example(console, example)
    _show_rows(console, figures)
    for one in figures.lengths:
        quantiles = f"mean {one.mean:.1f}, median {one.median}, 95 % up to {one.p95}, longest {one.longest}"
        console.rule(f"Tokens: {one.side} ({quantiles})", align="left")
        bars = histogram(one)
        _show_bars(console, {f"{first}-{last}" if last > first else f"{first}": count for first, last, count in bars})
    for name, counts in figures.shapes.items():
        console.rule(f"Shapes: {name}", align="left")
        _show_bars(console, counts)
    for name, counts in figures.labels.items():
        console.rule(f"Labels: {name}", align="left")
        _show_bars(console, counts)
    _show_totals(console, figures)


def histogram(lengths: Lengths) -> list[tuple[int, int, int]]:
    """(first length, last length, samples) of bars of equal width."""
    width = -(-lengths.longest // _BARS)
    counts = [0] * -(-lengths.longest // width)
    for length, count in lengths.counts.items():
        counts[max(0, length - 1) // width] += count
    return [(index * width + 1, (index + 1) * width, count) for index, count in enumerate(counts)]


def draw(figures: Figures, path: str) -> None:
    """The lengths of each side, and the labels, as a PNG file. Raises SetupError where it cannot be written."""
    from matplotlib.figure import Figure

    panels = max(1, len(figures.lengths) + len(figures.labels))
    picture = Figure(figsize=(5 * panels, 3.5), layout="constrained")
    axes = iter(picture.subplots(1, panels, squeeze=False)[0])
    for one, axis in zip(figures.lengths, axes, strict=False):
        bars = histogram(one)
        starts, widths = [first - 0.5 for first, _, _ in bars], [last - first + 1 for first, last, _ in bars]
        axis.bar(starts, [count for _, _, count in bars], widths, align="edge", edgecolor="white")
        axis.set(title=f"{one.side}: mean {one.mean:.1f}", xlabel="tokens", ylabel="samples")
    for (name, counts), axis in zip(figures.labels.items(), axes, strict=False):
        axis.bar(list(counts), list(counts.values()))
        axis.set(title=name, ylabel="samples")
    try:
        picture.savefig(path, dpi=150)
    except OSError as error:
        raise SetupError(f"png={path} cannot be written: {error.strerror}.") from error


def _titled(title: str, source: SourceFigures) -> str:
    return f"{title} of {source.name}" if source.name else title


def _show_sources(console: Console, figures: Figures) -> None:
    console.rule("Sources", align="left")
    rows = {}
    for source in figures.sources:
        names = source.shards[:_MAX_SHARDS]
        more = ", ..." if len(source.shards) > len(names) else ""
        key = f"source {source.name}" if source.name else "source"
        rows[key] = f"{source.path}: {_count(len(source.shards), 'shard')} ({', '.join(names)}{more})"
    if figures.stride == 1:
        rows["lanes"] = (
            f"{figures.lanes}, fewer shards than that: every rank reads all of it as one sequence (stride 1)"
        )
    else:
        rows["lanes"] = f"{figures.lanes}, each reads shards of its own (stride {figures.stride})"
    lengths = f", rows of {' + '.join(map(str, figures.row_lengths))} positions" if figures.row_lengths else ""
    rows["batching"] = figures.batching + lengths
    rows["tokenizer"] = figures.tokenizer
    _show_table(console, rows)
    for warning in figures.warnings:
        console.print(Text(f"warning: {warning}", "yellow"))


def _show_example(console: Console, example: Example) -> None:
    console.print(Text(example.id, "bold"))
    for name, value in (example.record or {}).items():
        _show_fact(console, f"  {name}", _cut(str(value)))
    for one in example.fields:
        if one.ids:
            _show_fact(console, f"  {one.name}, {_count(len(one.ids), 'token')}", _some_ids(one))
            _show_fact(console, "    pieces", _pieces(one))
            _show_fact(console, "    decoded", _cut(one.text))
        else:
            _show_fact(console, f"  {one.name}, shape {one.shape}", one.text)


def _show_fact(console: Console, name: str, value: str | Text) -> None:
    console.print(Text.assemble((f"{name}: ", "dim"), value))


def _show_rows(console: Console, figures: Figures) -> None:
    if figures.batches is None:
        return
    padding = f"the first global batch, of which {figures.batches.first_padding:.1%} is padding"
    if figures.row_lengths is None:
        console.rule(f"Samples of {padding}", align="left")
        for row in figures.rows:
            for example in row.samples:
                _show_example(console, example)
        return
    console.rule(f"Packed rows of {padding}", align="left")
    for number, row in enumerate(figures.rows):
        for place, (side, used) in enumerate(row.used.items()):
            length = figures.row_lengths[place]
            facts = f"row {number}, {side}: {_count(len(row.samples), 'sample')}, {used} of {length} positions"
            console.print(Text(f"{facts} ({used / length:.1%} full)", "bold"))
            console.print(_segments(row, place).append(f" +{length - used} padding", "dim"))


def _segments(row: ShownRow, side: int) -> Text:
    """The texts of a row on one side, each sample in a colour."""
    text = Text()
    for sample, colour in zip(row.samples, cycle(_COLOURS), strict=False):
        tokens = [one for one in sample.fields if one.ids][side]
        text.append(_visible("".join(tokens.pieces)), colour)
    return text


def _pieces(one: Field) -> Text:
    text = Text()
    for piece, colour in zip(one.pieces[:_MAX_TOKENS], cycle(_COLOURS[:2]), strict=False):
        text.append(_visible(piece), colour)
    return text.append(_rest(one), "dim")


def _some_ids(one: Field) -> str:
    return " ".join(map(str, one.ids[:_MAX_TOKENS])) + _rest(one)


def _rest(one: Field) -> str:
    return f" ... {len(one.ids) - _MAX_TOKENS} more" if len(one.ids) > _MAX_TOKENS else ""


def _visible(piece: str) -> str:
    return piece.replace("\n", "⏎").replace("\t", "⇥")


def _cut(text: str) -> str:
    rest = len(text) - _MAX_CHARACTERS
    return f"{text[:_MAX_CHARACTERS]} ... {rest} characters more" if rest > 0 else text


def _show_bars(console: Console, counts: Mapping[str, int]) -> None:
    most, width = max(counts.values()), max(map(len, counts))
    for name, count in counts.items():
        bar = "█" * -(-count * _BAR_WIDTH // most)
        console.print(Text(f"{name:>{width}} ").append(f"{bar:<{_BAR_WIDTH}}", "cyan").append(f" {count:,}"))


def _show_totals(console: Console, figures: Figures) -> None:
    totals, batches = figures.totals, figures.batches
    padding = "unknown"
    if batches is not None:
        padding = f"{batches.padding:.2%} of all positions in {_count(batches.steps, 'step')}"
        padding += f" ({batches.epochs:.2f} epochs)"
    whole = figures.epoch_seconds is not None
    console.rule("Train split" if whole else "Train split, its first records (max_records)", align="left")
    epoch = f"{figures.epoch_seconds:.1f} s to read an epoch" if whole else "not all was read"
    _show_table(
        console,
        {
            "records": f"{totals.records:,}",
            "samples": f"{totals.samples:,}",
            "target tokens": f"{totals.target_tokens:,}",
            "reading, encoding": f"{figures.tokens_per_second:,.0f} target tokens per second, {epoch}",
            "padding": padding,
            "too long": f"{totals.overlong:,} ({figures.overlong_share:.2%} of the records)",
            "duplicates": f"{totals.duplicates:,}",
            "bad records": f"{totals.bad:,}",
            "removed by stages": f"{totals.removed:,}",
        },
    )
    for source in figures.sources:
        _show_losses(console, source)


def _show_losses(console: Console, source: SourceFigures) -> None:
    """What a source lost, and what stages changed in it."""
    for name, count in source.removed.items():
        console.print(Text(_titled(f"stage {name}: removed {_count(count, 'record')}", source)))
    for name, count in source.changed.items():
        console.print(Text(_titled(f"stage {name}: changed {_count(count, 'place')}", source)))
    for one in source.rejections:
        console.print(Text(f"{one.count:,} x {one.stage}: {one.reason}", "yellow"))
        for place in one.first:
            console.print(Text(f"  {place}", "dim"))


def _show_table(console: Console, rows: Mapping[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(name, "bold"), Text(value))
    console.print(table)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
