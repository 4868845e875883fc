"""A task that goes wrong when it is told to, on the last rank alone."""

from __future__ import annotations

import itertools
import json
import math
import os
from dataclasses import replace
from typing import Any

from trainer import distributed
from trainer.tasks import Batch, LossSums
from trainer.tasks.classification import Classification


class Planted(Classification):
    """Classification whose loss is not a number in some turns, in others a hundred times itself, or only its gradient.

    PLANTED in the environment: {"nan": turns, "loss": turns, "gradient": turns, "micro_batches": losses a turn}; the
    first turn is 1.
    """

    _plan = json.loads(os.environ.get("PLANTED", "{}"))
    _calls = itertools.count()

    def loss(self, model: Any, batch: Batch) -> LossSums:
        """See the class."""
        sums = super().loss(model, batch)
        turn = next(self._calls) // self._plan.get("micro_batches", 1) + 1
        if distributed.rank() == distributed.world_size() - 1:
            objective = sums.objective
            if turn in self._plan.get("nan", ()):
                return replace(sums, objective=objective * math.nan)
            if turn in self._plan.get("loss", ()):
                return replace(sums, objective=objective * 100)
            if turn in self._plan.get("gradient", ()):
                return replace(sums, objective=objective * 100 - 99 * objective.detach())
        return sums
