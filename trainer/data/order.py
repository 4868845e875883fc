"""The order of the samples: pure functions of (seed, epoch) and the sizes that define the stream; nothing is read.

Every permutation sorts raw 64-bit words of numpy's PCG64, whose streams are fixed for good, unlike
`Generator.permutation`, which a later numpy may change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Batching = Literal["bucketed", "packed", "padded"]
"""Steps of similar lengths; rows of a fixed size that samples share; samples as they come, padded."""


class _Use(IntEnum):
    """What a permutation is for; part of its seed, so that no two uses share one."""

    shards = 1
    block = 2
    schedule = 3
    augmentation = 4


def _permutation(count: int, *entropy: int) -> NDArray[np.intp]:
    """A permutation of `count` things: a function of `entropy` (any integers) alone."""
    seeds = [value & 0xFFFF_FFFF_FFFF_FFFF for value in entropy]
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(count), kind="stable")


@lru_cache(maxsize=8)
def _schedule(steps: int, *entropy: int) -> NDArray[np.intp]:
    """`_permutation`, kept for a while: every lane asks for the same ones."""
    return _permutation(steps, *entropy)


@dataclass(frozen=True, slots=True)
class Order:
    """The rules of the stream. `block`: records of a lane's block; `global_size`: samples of a step.

    In "bucketed" batching every step has a length quantile, drawn without repetition from a cycle of as many steps as
    one block of every lane feeds. Samples sorted by length go to steps sorted by quantile. As the quantile belongs to
    the step, lanes agree on it whatever the sizes of their blocks, and neither ranks nor micro-batches have a part in
    it.
    """

    seed: int
    lanes: int
    block: int
    global_size: int
    shuffle: bool
    batching: Batching

    def augmentation(self, place: int, number: int) -> int:
        """The seed, below 2^64, of what is random about sample `number` of the row at `place` of the stream."""
        seeds = [self.seed & 0xFFFF_FFFF_FFFF_FFFF, _Use.augmentation, place, number]
        return int(np.random.PCG64(np.random.SeedSequence(seeds)).random_raw())

    def shards(self, num_shards: int, epoch: int) -> list[int]:
        """The order in which an epoch reads the shards."""
        if not self.shuffle:
            return list(range(num_shards))
        order: list[int] = _permutation(num_shards, self.seed, _Use.shards, epoch).tolist()
        return order

    def arrange(
        self, key: Sequence[int], stream_indices: NDArray[np.int64], lengths: Sequence[tuple[int, ...]]
    ) -> list[int]:
        """The order in which the samples of a block are emitted, as indices into it.

        key: what makes the block's shuffle its own (lane, epoch, block index); stream_indices: int64 [n], ascending,
        the places in the whole stream that the block will fill; lengths: sort key of each of the n samples.
        """
        count = len(lengths)
        order = self.shuffled(key, count)
        if self.batching != "bucketed":
            return order
        order.sort(key=lengths.__getitem__)
        emitted = np.empty(count, np.intp)
        emitted[np.argsort(self._quantiles(stream_indices // self.global_size), kind="stable")] = order
        arranged: list[int] = emitted.tolist()
        return arranged

    def shuffled(self, key: Sequence[int], count: int) -> list[int]:
        """The order of `count` things that the shuffle alone gives; `key`: see `arrange`."""
        if not self.shuffle:
            return list(range(count))
        order: list[int] = _permutation(count, self.seed, _Use.block, *key).tolist()
        return order

    def _quantiles(self, steps: NDArray[np.int64]) -> NDArray[np.intp]:
        """The quantile of each of `steps`, an integer below the number of steps in a cycle."""
        cycle_steps = max(1, self.block * self.lanes // self.global_size)
        if not self.shuffle:
            return (steps % cycle_steps).astype(np.intp)
        quantiles = np.empty(len(steps), np.intp)
        cycles = steps // cycle_steps
        for cycle in np.unique(cycles):
            schedule = _schedule(cycle_steps, self.seed, _Use.schedule, int(cycle))
            quantiles[cycles == cycle] = schedule[steps[cycles == cycle] % cycle_steps]
        return quantiles
