"""Text from a trained run: `python -m trainer.generate run=NAME text="A sentence." [input=FILE|-] [output=FILE]`.

One line of output for each text, in order; a translation run translates, a language model continues. Without a text,
at a terminal, it asks for one after the other. Under torchrun the ranks share the texts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from trainer import distributed
from trainer.commands import run_command
from trainer.errors import ConfigError, DataError
from trainer.host import keep_compiled_products, keep_freed_memory
from trainer.tasks import BadRecord, Decoding, Encoded, GeneratesText


@dataclass(frozen=True)
class GenerateOptions:
    """Arguments of `python -m trainer.generate`. temperature, top_k, top_p ask for sampling; beam_size=1 is greedy.

    sharded: under torchrun, the parameters are spread over the ranks (ZeRO-3), for models that fit no single device.
    """

    run: str
    text: list[str] = field(default_factory=list)
    input: str | None = None
    output: str | None = None
    beam_size: int | None = None
    max_length: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    batch_size: int = 64
    sharded: bool = False
    runs_dir: str = "runs"
    checkpoint: str = "latest"
    weights: str = "master"
    allow_targets: list[str] = field(default_factory=list)


def generate_texts(
    task: GeneratesText,
    model: torch.nn.Module,
    texts: Sequence[str],
    how: Decoding,
    batch_size: int = 64,
    together: bool = False,
) -> list[str]:
    """What `model` writes for each text, in order; texts of similar length go together. A blank text gives "".

    Ranks take turns at the batches, and all return everything. together: they share the model's parameters, so that one
    with fewer batches, or shorter texts, goes on until all are done. Raises DataError, naming the text by number
    (from 1), for one the task cannot take.
    """
    places = [place for place, text in enumerate(texts) if text.strip()]
    encoded: list[tuple[int, Encoded]] = []
    for place, sample in zip(places, task.encode_prompts([texts[place] for place in places]), strict=True):
        if isinstance(sample, BadRecord):
            raise DataError(f"Text {place + 1} of {len(texts)} cannot be used: {sample.reason}.")
        encoded.append((place, sample))
    encoded.sort(key=lambda pair: pair[1].length)
    batches = [encoded[start : start + batch_size] for start in range(0, len(encoded), batch_size)]
    mine: dict[int, str] = {}
    with torch.inference_mode():
        rank, ranks = distributed.rank(), distributed.world_size()
        own = batches[rank::ranks]
        idle = batches[:1] * (-(-len(batches) // ranks) - len(own)) if together else []
        all_finished = distributed.every_rank if together else None
        for batch in (*own, *idle):
            outputs = task.generate(model, [sample for _, sample in batch], all_finished, how)
            mine |= dict(zip((place for place, _ in batch), outputs, strict=True))
    everyone = {place: text for part in distributed.all_gather_objects(mine) for place, text in part.items()}
    return [everyone.get(place, "") for place in range(len(texts))]


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
        raise ConfigError(
            'There is no text to work on; give text="..." or input=FILE (or input=- for standard input), or nothing at'
            " a terminal to be asked."
        )
    return texts


def _check(options: GenerateOptions) -> None:
    problems = [
        f"{key}={value} must be at least 1."
        for key, value in (
            ("beam_size", options.beam_size),
            ("max_length", options.max_length),
            ("top_k", options.top_k),
            ("batch_size", options.batch_size),
        )
        if value is not None and value < 1
    ]
    if options.beam_size is not None and _how(options).samples:
        problems.append(
            f"beam_size={options.beam_size} searches, and temperature, top_k and top_p sample; give one kind."
        )
    if problems:
        raise ConfigError(*problems)


def _how(options: GenerateOptions) -> Decoding:
    return Decoding(
        options.beam_size, options.max_length, options.temperature, options.top_k, options.top_p, options.seed
    )


def _generate(options: GenerateOptions) -> None:
    _check(options)
    asks = not options.text and options.input is None and sys.stdin.isatty()
    texts = [] if asks else _read_texts(options)
    from trainer.evaluate import write_atomically
    from trainer.restore import restore_run

    keep_compiled_products()
    keep_freed_memory()  # beams copy their cache at every step
    with distributed.process_group(always=options.sharded):
        found = options.run, options.runs_dir, options.checkpoint, options.allow_targets, options.weights
        restored = restore_run(*found, options.sharded)
        task, model = restored.task, restored.model
        if not isinstance(task, GeneratesText):
            raise ConfigError(f"run={options.run}: its task {type(task).__name__} does not generate text.")

        def write(some: Sequence[str]) -> list[str]:
            return generate_texts(task, model, some, _how(options), options.batch_size, options.sharded)

        if asks:
            _converse(write)
            return
        lines = "".join(" ".join(line.splitlines()) + "\n" for line in write(texts))
        if distributed.rank() > 0:
            return
        if options.output is None:
            sys.stdout.write(lines)
        else:
            write_atomically(Path(options.output), lines)
            from trainer.metrics.wandb.lineage import tell

            used = {"output": options.output, "texts": len(texts), "beam_size": options.beam_size}
            tell("generate", restored.config, restored.directory.path, restored.steps, used)


def _converse(write: Callable[[Sequence[str]], list[str]]) -> None:
    """Ask for texts until there are no more."""
    print("One text a line; an empty line or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not text.strip():
            return
        try:
            print(*write([text]), flush=True)
        except DataError as error:
            print(error, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(GenerateOptions, _generate, str(__doc__), argv)


if __name__ == "__main__":
    sys.exit(main())
