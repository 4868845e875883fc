"""What a run thinks of the answers of a preference data set, for `task=preference` to start from:
`python -m trainer.reference_scores run=NAME data=PATH to=FOLDER`.

Writes FOLDER/{train,validation,test}.parquet: the records, and in `chosen_logp` and `rejected_logp` the log-probability
of either answer in nats. Records that cannot be used are left out and counted.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from trainer import distributed
from trainer.commands import run_command
from trainer.errors import ConfigError, DataError, SetupError
from trainer.tasks import BadRecord, Encoded, Record

NAMES = ("chosen_logp", "rejected_logp")

_READ_RECORDS = 2048
"""Records scored between two writes; batches are made of those of similar length."""


@dataclass(frozen=True)
class ScoreOptions:
    """Arguments of `python -m trainer.reference_scores`."""

    run: str
    data: str
    to: str
    split: list[str] = field(default_factory=list)
    prompt_column: str = "prompt"
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"
    batch_size: int = 16
    runs_dir: str = "runs"
    checkpoint: str = "latest"
    allow_targets: list[str] = field(default_factory=list)


def _score(options: ScoreOptions) -> None:
    from trainer.data.dataset import SPLITS, Dataset
    from trainer.restore import restore_run

    if options.batch_size < 1:
        raise ConfigError(f"batch_size={options.batch_size} must be at least 1.")
    to = Path(options.to)
    if to.exists():
        raise ConfigError(f"to={to} exists already; name a new folder.")
    splits = options.split or list(SPLITS)
    dataset = Dataset("data", options.data)
    for split in splits:
        dataset.check(split, [options.prompt_column, options.chosen_column, options.rejected_column])
    restored = restore_run(options.run, options.runs_dir, options.checkpoint, options.allow_targets)
    scorer = _Scorer(options, restored.config.task, restored.tokenizer, restored.model)
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for split in splits:
            records = (record for _, record in dataset.records(split))
            print(f"{split}: {scorer.write(records, partial / f'{split}.parquet')}", flush=True)
        partial.rename(to)
    except OSError as error:
        raise SetupError(f"to={to} cannot be written: {error}; make room or choose another folder.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Scorer:
    """A model with the preference task that reads as the run's own task does."""

    def __init__(self, options: ScoreOptions, task: Any, tokenizer: Any, model: torch.nn.Module) -> None:
        from trainer.tasks.preference import Preference

        kept = {name: task[name] for name in ("chat_template", "system", "sequence_length") if name in task}
        if "chat_template" not in kept:
            raise ConfigError(
                f"run={options.run} is of the task {task['_target_'].rpartition('.')[2]}, which has no chat template;"
                " name a run of task=chat or task=preference."
            )
        columns = options.prompt_column, options.chosen_column, options.rejected_column
        self._task = Preference(tokenizer, *columns, reference_columns=(), **kept)
        self._model = model
        self._batch_size = options.batch_size

    def write(self, records: Iterator[Record], path: Path) -> str:
        """A Parquet file of the usable records with their scores; returns what to tell of them."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        writer: Any = None
        kept = preferred = 0
        bad: list[str] = []
        while part := list(islice(records, _READ_RECORDS)):
            rows = self._scored(part, bad)
            kept += len(rows)
            preferred += sum(row[NAMES[0]] > row[NAMES[1]] for row in rows)
            if not rows:
                continue
            try:
                table = pa.Table.from_pylist(rows, schema=None if writer is None else writer.schema)
            except pa.ArrowException as error:
                raise DataError(f"{path.stem}: records differ in the types of their columns: {error}") from error
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is None:
            raise DataError(f"{path.stem}: no record can be used" + (f"; the first: {bad[0]}." if bad else "."))
        writer.close()
        told = f"{kept:,} pairs, the chosen answer the likelier in {preferred / kept:.1%}"
        return told + (f"; {len(bad):,} left out, the first: {bad[0]}" if bad else "")

    def _scored(self, records: Sequence[Record], bad: list[str]) -> list[dict[str, Any]]:
        samples: list[tuple[int, Encoded]] = []
        for place, sample in enumerate(self._task.encode(records)):
            if isinstance(sample, BadRecord):
                bad.append(sample.reason)
            else:
                samples.append((place, sample))
        samples.sort(key=lambda pair: pair[1].length)
        rows: list[tuple[int, dict[str, Any]]] = []
        with torch.inference_mode():
            for start in range(0, len(samples), self._batch_size):
                places, chunk = zip(*samples[start : start + self._batch_size], strict=True)
                batch = {name: value.to(distributed.device()) for name, value in self._task.collate(chunk).items()}
                scores = self._task.log_probs(self._model, batch).tolist()
                rows += [
                    (place, {**records[place], **dict(zip(NAMES, both, strict=True))})
                    for place, both in zip(places, scores, strict=True)
                ]
        return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(ScoreOptions, _score, str(__doc__), argv)


if __name__ == "__main__":
    sys.exit(main())
