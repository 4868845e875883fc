"""The weights of a run to use: of a checkpoint, their moving average in it, or the mean of several checkpoints.

Streaming: a tensor at a time, and of that one checkpoint's part beside the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from trainer.checkpoint import is_step_name
from trainer.checkpoint.load import Checkpoint, Columns, Reader, find, read
from trainer.errors import CheckpointError, ConfigError

_MEAN = "average:"


def find_all(root: Path, which: str) -> list[Checkpoint]:
    """The checkpoints named by `which`, newest first: the last N for "average:N", else the one that `find` finds.

    Raises ConfigError where N is no number above 1, CheckpointError where there are fewer.
    """
    if not which.startswith(_MEAN):
        return [find(root, which)]
    number = which.removeprefix(_MEAN)
    if not number.isdigit() or int(number) < 2:
        raise ConfigError(f"checkpoint={which}: give a number of checkpoints from 2 on, such as {_MEAN}5.")
    folders = sorted((path for path in root.glob("step_*") if path.is_dir() and is_step_name(path.name)), reverse=True)
    if len(folders) < int(number):
        raise CheckpointError(
            f"checkpoint={which} wants {number} checkpoints, and {root} has {len(folders)}; lower the number, or let"
            f" the run keep more with checkpoint.keep={number}."
        )
    return [read(folder) for folder in folders[: int(number)]]


class WeightReader(Reader):
    """Reads as master weights the mean over `checkpoints` of their state `weights`, "master" or "ema"."""

    def __init__(self, checkpoints: Sequence[Checkpoint], weights: str = "master") -> None:
        """Raises ConfigError for other `weights`."""
        super().__init__(checkpoints[0])
        if weights not in ("master", "ema"):
            raise ConfigError(f"weights={weights} is not one of master, ema.")
        self._weights = weights
        self._readers = [Reader(checkpoint) for checkpoint in checkpoints]

    def __enter__(self) -> WeightReader:
        with ExitStack() as stack:
            for reader in self._readers:
                stack.enter_context(reader)
            for (parameter, state), shape in self._readers[0].shapes.items():
                if state == self._weights:
                    self.shapes[parameter, "master"] = shape
            if not self.shapes:
                raise CheckpointError(
                    f"{self._checkpoint.folder} has no {self._weights} of any parameter; a moving average is kept by"
                    " runs with ema.decay. Use weights=master."
                )
            self._files = stack.pop_all()
        return self

    def read_into(self, parameter: str, state: str, start: int, target: torch.Tensor, columns: Columns = None) -> None:
        """See `Reader`; `state` is "master"."""
        assert state == "master", f"{state} is no weight"
        self._readers[0].read_into(parameter, self._weights, start, target, columns)
        for reader in self._readers[1:]:
            part = torch.empty_like(target)
            reader.read_into(parameter, self._weights, start, part, columns)
            target += part
        if len(self._readers) > 1:
            target /= len(self._readers)

    def check_held(self, parameter: str, state: str) -> None:
        """See `Reader`."""
        assert state == "master", f"{state} is no weight"
        for reader in self._readers:
            reader.check_held(parameter, self._weights)
