"""A moving average of the weights, beside any engine, on the pieces of the fp32 masters that each rank holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from trainer.engine.base import Engine, Fragment

if TYPE_CHECKING:
    from trainer.config import EmaConfig
    from trainer.tasks import Batch, LossSums, Task

AVERAGE = "ema"
"""The key of its fragments."""


def with_average(engine: Engine, ema: EmaConfig) -> Engine:
    """`engine`, averaging its weights if `ema` says so."""
    return engine if ema.decay is None else AveragingEngine(engine, ema.decay, ema.evaluate)


class AveragingEngine:
    """See `trainer.engine.base.Engine`, which the `engine` inside it is. After every update,

    average <- decay average + (1 - decay) master (Polyak & Juditsky 1992, in its exponential form), beginning at the
    first weights. It is a state like those of an optimizer: each master has a fragment of it, with which it is saved,
    resumed and resharded. evaluates: in evaluation, masters and average change places.
    """

    def __init__(self, engine: Engine, decay: float, evaluates: bool) -> None:
        self._engine = engine
        self._decay = decay
        self._evaluates = evaluates
        self._averages: list[torch.Tensor] = []
        """One for each piece of the masters, in the order of the fragments."""
        self.module = engine.module
        self.model = engine.model
        self.fragments_stay = engine.fragments_stay
        self.ranks_must_step_together = engine.ranks_must_step_together

    def forward_backward(self, task: Task, batch: Batch, scale: float, last: bool) -> LossSums:
        """See the contract."""
        return self._engine.forward_backward(task, batch, scale, last)

    def step(self, lr: float, max_norm: float = math.inf, measure: bool = False) -> float:
        """See the contract. Without an update, the average stays as it is, too."""
        skipped = self.skipped_steps
        norm = self._engine.step(lr, max_norm, measure)
        if self.skipped_steps == skipped:
            masters, averages = zip(*self._pairs(), strict=True)
            torch._foreach_lerp_(averages, masters, 1.0 - self._decay)
        return norm

    @property
    def squares(self) -> Mapping[str, float]:
        """See the contract."""
        return self._engine.squares

    @property
    def skipped_steps(self) -> int:
        """See the contract."""
        return self._engine.skipped_steps

    def frozen(self) -> Iterator[Fragment]:
        """See the contract."""
        return self._engine.frozen()

    def fragments(self) -> Iterator[Fragment]:
        """See the contract; after each piece of the masters comes the same piece of the average."""
        place = 0
        for fragment in self._engine.fragments():
            yield fragment
            if fragment.key == "master":
                if place == len(self._averages):
                    self._averages.append(fragment.tensor.clone())
                yield replace(fragment, key=AVERAGE, tensor=self._averages[place])
                place += 1

    def _pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(piece of the masters, its average)"""
        pieces = [one.tensor for one in self.fragments() if one.key in ("master", AVERAGE)]
        return list(zip(pieces[::2], pieces[1::2], strict=True))

    def scalars(self) -> dict[str, float]:
        """See the contract."""
        return self._engine.scalars()

    def after_load(self, scalars: Mapping[str, float]) -> None:
        """See the contract."""
        self._engine.after_load(scalars)

    @contextmanager
    def _with_average(self) -> Iterator[None]:
        self._exchange()
        try:
            with self._engine.evaluating():
                yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        """Let masters and average change places, and the parameters follow the masters."""
        for master, average in self._pairs():
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
        self._engine.after_load(self._engine.scalars())

    def evaluating(self) -> AbstractContextManager[None]:
        """See the contract."""
        return self._with_average() if self._evaluates else self._engine.evaluating()
