"""Which ranks hold what: the whole job as data x sequence x tensor parallel ranks, tensor parallel ones next to each
other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist

from trainer import distributed

if TYPE_CHECKING:
    from trainer.plan import RunPlan


@dataclass(frozen=True, slots=True)
class Layout:
    """This rank's place. data, sequence, tensor: how many ranks there are of each kind.

    shard_group: the ranks that hold the same part of the model's matrices, data x sequence of them; gradients are
    summed over it and ZeRO shards over it. sequence_group, tensor_group: the ranks among which one sequence, or one
    matrix, is split. None stands for a group of all ranks or of this one alone.
    """

    rank: int = 0
    data: int = 1
    sequence: int = 1
    tensor: int = 1
    shard_group: dist.ProcessGroup | None = None
    sequence_group: dist.ProcessGroup | None = None
    tensor_group: dist.ProcessGroup | None = None

    @property
    def tensor_rank(self) -> int:
        """Which part of the matrices this rank holds."""
        return self.rank % self.tensor

    @property
    def sequence_rank(self) -> int:
        """Which part of the positions of a sequence this rank holds."""
        return self.rank // self.tensor % self.sequence

    @property
    def data_rank(self) -> int:
        """Which part of the global batch this rank trains on."""
        return self.rank // (self.tensor * self.sequence)

    @property
    def shard_rank(self) -> int:
        """This rank's place in `shard_group`."""
        return self.rank // self.tensor

    @property
    def shards(self) -> int:
        """Ranks in `shard_group`."""
        return self.data * self.sequence

    def saves(self, is_split: bool) -> bool:
        """Whether this rank, of its tensor parallel ones, saves a parameter: all their parts, the first a whole one."""
        return is_split or self.tensor_rank == 0

    @property
    def speaks(self) -> bool:
        """Whether this rank tells what was in its samples, which sequence x tensor ranks share."""
        return self.rank % (self.tensor * self.sequence) == 0


def layout_of_first_rank(plan: RunPlan) -> Layout:
    """The layout of a job of which only the plan exists: where rank 0 would be, without process groups."""
    return Layout(0, plan.data_parallel, plan.sequence_parallel, plan.tensor_parallel)


def make_layout(sequence: int, tensor: int) -> Layout:
    """The layout of the running job; all ranks call it together, for it makes process groups.

    `sequence` x `tensor` must divide the number of ranks.
    """
    rank, ranks = distributed.rank(), distributed.world_size()
    assert ranks % (sequence * tensor) == 0, f"{sequence} x {tensor} do not divide {ranks}"
    if sequence * tensor == 1:
        return Layout(rank, ranks)
    data = ranks // (sequence * tensor)
    shard, own_sequence, own_tensor = members(rank, ranks, sequence, tensor)
    groups: dict[range, dist.ProcessGroup] = {}
    for group in (shard, own_sequence, own_tensor):
        if group not in groups:  # a name is made of the members, so the same ones must not meet twice
            # By its members alone: thousands of groups of which this rank is no part would each cost it a call.
            groups[group] = dist.new_group(list(group), use_local_synchronization=True)
    return Layout(rank, data, sequence, tensor, groups[shard], groups[own_sequence], groups[own_tensor])


def members(rank: int, ranks: int, sequence: int, tensor: int) -> tuple[range, range, range]:
    """The ranks of a rank's `shard_group`, `sequence_group` and `tensor_group` (see `Layout`)."""
    part, block = rank % tensor, rank // (tensor * sequence) * tensor * sequence
    first = rank - part
    return (
        range(part, ranks, tensor),
        range(block + part, block + tensor * sequence, tensor),
        range(first, first + tensor),
    )
