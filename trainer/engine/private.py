"""DP-SGD (Abadi et al. 2016, algorithm 1) on the plain engine: each sample's gradient is clipped, and noise added."""

from __future__ import annotations

import math
import secrets
from typing import Any

import torch
import torch.distributed as dist

from trainer import distributed
from trainer.engine.plain import PlainEngine
from trainer.tasks import IGNORE, Batch, LossSums, Task


class PrivateEngine(PlainEngine):
    """A step's gradient is (sum over samples of clip(g) + noise) / global batch, where g is the gradient of a sample's
    mean loss over its target tokens, clip scales it down to the norm `clip_norm`, and the noise is normal with
    deviation noise_multiplier x clip_norm.

    Samples pass one at a time, which every model and layer takes. Noise comes from the system's entropy, the same on
    all ranks: a run cannot be repeated, and nobody can subtract it.
    """

    def __init__(self, *arguments: Any, noise_multiplier: float, sample_norm: float, global_size: int) -> None:
        """arguments: of PlainEngine; noise_multiplier, sample_norm: see above; global_size: samples a step."""
        super().__init__(*arguments)
        self._noise, self._sample_norm, self._global_size = noise_multiplier * sample_norm, sample_norm, global_size
        self._clipped = torch.zeros_like(self._sum_flat)
        self._generator = torch.Generator(self._clipped.device)
        self._generator.manual_seed(distributed.on_rank_zero(lambda: secrets.randbits(62)))

    def forward_backward(self, task: Task, batch: Batch, scale: float, last: bool) -> LossSums:
        """See the contract; `scale` weighs by tokens, and here every sample counts the same whatever its length."""
        made = [self._one(task, batch, row) for row in range(len(batch["labels"]))]
        if last:
            self._sum_flat.copy_(self._clipped)
            self._clipped.zero_()
            if self._layout.shards > 1:
                dist.all_reduce(self._sum_flat, group=self._layout.shard_group)
            noise = torch.empty_like(self._sum_flat).normal_(generator=self._generator)
            self._sum_flat.add_(noise, alpha=self._noise).div_(self._global_size)
        fields = zip(*((one.objective, one.nll, one.num_target_tokens, one.num_correct) for one in made), strict=True)
        return LossSums(*(torch.stack(field).sum() for field in fields))

    def _one(self, task: Task, batch: Batch, row: int) -> LossSums:
        sample = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        tokens = int((sample["labels"] != IGNORE).sum())
        self._sum_flat.zero_()
        sums = super().forward_backward(task, sample, 1.0 / max(tokens, 1), last=False)
        norm = float(torch.linalg.vector_norm(self._sum_flat))
        if tokens and math.isfinite(norm):
            self._clipped.add_(self._sum_flat, alpha=min(1.0, self._sample_norm / max(norm, 1e-12)))
        self._sum_flat.zero_()
        return LossSums(sums.objective.detach(), sums.nll, sums.num_target_tokens, sums.num_correct)
