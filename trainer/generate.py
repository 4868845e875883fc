"""Text from a trained run: `python -m trainer.generate run=NAME text="A sentence." [input=FILE|-] [output=FILE]`.

One line of output for each text, in order; a translation run translates, a language model continues.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from trainer.commands import run_command
from trainer.errors import ConfigError, DataError
from trainer.tasks import BadRecord, Encoded, GeneratesText


@dataclass(frozen=True)
class GenerateOptions:
    """Arguments of `python -m trainer.generate`."""

    run: str
    text: list[str] = field(default_factory=list)
    input: str | None = None
    output: str | None = None
    beam_size: int | None = None
    max_length: int | None = None
    batch_size: int = 64
    runs_dir: str = "runs"
    checkpoint: str = "latest"
    weights: str = "master"
    allow_targets: list[str] = field(default_factory=list)


def generate_texts(
    task: GeneratesText,
    model: torch.nn.Module,
    texts: Sequence[str],
    beam_size: int | None = None,
    max_length: int | None = None,
    batch_size: int = 64,
) -> list[str]:
    """What `model` writes for each text, in order; texts of similar length go together. A blank text gives "".

    Raises DataError, naming the text by number (from 1), for one the task cannot take.
    """
    places = [place for place, text in enumerate(texts) if text.strip()]
    encoded: list[tuple[int, Encoded]] = []
    for place, sample in zip(places, task.encode_prompts([texts[place] for place in places]), strict=True):
        if isinstance(sample, BadRecord):
            raise DataError(f"Text {place + 1} of {len(texts)} cannot be used: {sample.reason}.")
        encoded.append((place, sample))
    encoded.sort(key=lambda pair: pair[1].length)
    written = [""] * len(texts)
    with torch.inference_mode():
        for start in range(0, len(encoded), batch_size):
            batch = encoded[start : start + batch_size]
            outputs = task.generate(model, [sample for _, sample in batch], beam_size=beam_size, max_length=max_length)
            for (place, _), output in zip(batch, outputs, strict=True):
                written[place] = output
    return written


def _read_texts(options: GenerateOptions) -> list[str]:
    texts = list(options.text)
    if options.input == "-":
        texts += sys.stdin.read().splitlines()
    elif options.input is not None:
        try:
            texts += Path(options.input).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"input={options.input} cannot be read as UTF-8 text: {error}.") from error
    if not texts:
        raise ConfigError('There is no text to work on; give text="..." or input=FILE (or input=- for standard input).')
    return texts


def _check(options: GenerateOptions) -> None:
    problems = [
        f"{key}={value} must be at least 1."
        for key, value in (
            ("beam_size", options.beam_size),
            ("max_length", options.max_length),
            ("batch_size", options.batch_size),
        )
        if value is not None and value < 1
    ]
    if problems:
        raise ConfigError(*problems)


def _generate(options: GenerateOptions) -> None:
    _check(options)
    texts = _read_texts(options)
    from trainer.evaluate import write_atomically
    from trainer.restore import restore_run

    found = options.run, options.runs_dir, options.checkpoint, options.allow_targets, options.weights
    restored = restore_run(*found)
    if not isinstance(restored.task, GeneratesText):
        raise ConfigError(f"run={options.run}: its task {type(restored.task).__name__} does not generate text.")
    written = generate_texts(
        restored.task, restored.model, texts, options.beam_size, options.max_length, options.batch_size
    )
    lines = "".join(" ".join(line.splitlines()) + "\n" for line in written)
    if options.output is None:
        sys.stdout.write(lines)
    else:
        write_atomically(Path(options.output), lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(GenerateOptions, _generate, str(__doc__), argv)


if __name__ == "__main__":
    sys.exit(main())
