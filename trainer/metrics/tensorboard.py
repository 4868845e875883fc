"""TensorBoard: `tensorboard --logdir runs`. The only importer of torch.utils.tensorboard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from trainer.errors import SetupError
from trainer.metrics import RunInfo, StepInfo
from trainer.wording import flatten

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


class TensorBoardSink:
    """Event files in `tensorboard/` of the run directory; a resumed run hides what it repeats (`purge_step`)."""

    def __init__(self, flush_seconds: int = 30) -> None:
        """flush_seconds: how long what is logged may wait in memory."""
        self._flush_seconds = flush_seconds
        self._writer: SummaryWriter | None = None

    def open(self, run: RunInfo) -> None:
        """See the contract. Raises SetupError where tensorboard is not installed."""
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise SetupError(
                "tensorboard is not installed; install shardwright[tensorboard], or take it out of logging=[...]."
            ) from error
        folder = run.directory / "tensorboard"
        purge = run.first_step + 1 if run.first_step > 0 else None
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=self._flush_seconds)

    def log(self, info: StepInfo) -> None:
        """See the contract."""
        self._scalars(info.step, "train/", {name: v for name, v in flatten(info.row()) if name != "step"})

    def log_evaluation(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """See the contract."""
        split = metrics.get("split", "eval")
        self._scalars(step, "", {name.replace("eval/", f"{split}/", 1): value for name, value in metrics.items()})

    def event(self, step: int, message: str) -> None:
        """See the contract."""
        if self._writer is not None:
            self._writer.add_text("events", message, step)

    def close(self, status: str) -> None:
        """See the contract."""
        if self._writer is not None:
            self._writer.add_text("status", status)
            self._writer.close()
            self._writer = None

    def _scalars(self, step: int, prefix: str, values: Mapping[str, object]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"{prefix}{name}", value, step)
