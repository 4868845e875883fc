"""What is random about a sample follows from the run's seed and its place in the stream, whoever reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.data.fakes import LengthTask, MemorySource, memory_data, saved, steps_of
from trainer.tasks import Encoded


class Noting(LengthTask):
    """Notes in each sample the seed that it was changed with."""

    def augment(self, sample: Encoded, seed: int) -> Encoded:
        return sample._replace(fields={**sample.fields, "seed": np.asarray([seed], np.uint64)})

    def collate(self, samples: Sequence[Encoded]) -> Any:
        return {**super().collate(samples), "seeds": [int(sample.fields["seed"][0]) for sample in samples]}

    def collate_rows(self, rows: Sequence[Sequence[Encoded]], row_lengths: tuple[int, ...]) -> Any:
        samples = [sample for row in rows for sample in row]
        return {**super().collate_rows(rows, row_lengths), "seeds": self.collate(samples)["seeds"]}


def seeds_of(sizes: Sequence[int], count: int, workers: int = 0, batching: str = "bucketed", **options: Any) -> Any:
    """The seeds of each step, sorted, and the ranks' steps."""
    data = memory_data(MemorySource(sizes), lanes=24, block=8, workers=workers, batching=batching)
    ranks = steps_of(data, count, task=Noting(20), **options)
    steps = zip(*ranks, strict=True)
    return [
        sorted(s for step in group for batch in step.micro_batches for s in batch["seeds"]) for group in steps
    ], ranks


@pytest.mark.parametrize("batching", ["bucketed", "packed"])
@pytest.mark.parametrize("sizes", [(30,) * 30, (100,)])
def test_seeds_do_not_depend_on_ranks_workers_or_resuming(sizes: tuple[int, ...], batching: str) -> None:
    whole, _ = seeds_of(sizes, 8, batching=batching)
    first, ranks = seeds_of(sizes, 5, workers=1, batching=batching)
    rest, _ = seeds_of(sizes, 3, world_size=2, states=saved(ranks), batching=batching)
    assert first + rest == whole


def test_every_sample_gets_another_seed_in_every_epoch_and_run() -> None:
    one, ranks = seeds_of((100,), 12)
    flat = [seed for step in one for seed in step]
    assert ranks[0][-1].epoch > 2 and len(set(flat)) == len(flat)
    assert all(0 <= seed < 2**64 for seed in flat)
    other, _ = seeds_of((100,), 12, seed=1)
    assert not set(flat) & {seed for step in other for seed in step}
