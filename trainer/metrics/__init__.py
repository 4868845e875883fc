"""Metrics: facts flow out, observers do not reach in.

`meter.py` turns measurements into a frozen `StepInfo` (pure arithmetic, injected clock). The observers are `sinks.py`
(`metrics.jsonl`, always on, the truth), `console.py` and `wandb/` (Weights & Biases). A sink that fails is reported
once and switched off; it never stops the training.

The contract of a sink: `open(run)` once on rank 0 after the process group exists; `log(info)` per logged step;
`log_evaluation(step, metrics)`, where `split` names a split other than validation; `event(step, message)`;
`close(status)`. No method may block for long or raise to the caller (`SafeSinks` guards them all). A sink may have two
more: `alarm(step, message)`, instead of `event`, for what a person should hear of; `saved(step, checkpoint)`, once the
checkpoint in that folder is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class StepInfo:
    """What is known after an optimizer step. `metrics.jsonl` carries these names as they are.

    loss: objective per target token over the global batch, nats; tokens, samples: totals since the first step;
    target_tokens: positions with loss in this step's global batch; padding_fraction: padding / positions since the last
    logged step; step_seconds: mean since the last logged step; loader_wait_seconds: mean wait for data per step since
    then; mfu: model FLOP/s over the peak, or None where the peak is unknown; memory_bytes: peak resident (CPU) or
    allocated (GPU) memory of the largest rank; skipped_steps: steps without an update so far; data:
    records in the first pass that could not be used ("bad_record"), and those each stage removed or changed, so far;
    norms: of the gradient before clipping by group of layers (see `log.norms`), together `grad_norm`; mixture: the
    share of each source since the last logged step, in what the weights count, {} of a single source; memory_by_rank:
    peaks like memory_bytes, where one has grown since they were last told, else {}.
    """

    step: int
    tokens: int
    samples: int
    epoch: float
    loss: float
    grad_norm: float
    lr: float
    step_seconds: float
    tokens_per_second: float
    target_tokens: int
    padding_fraction: float
    loader_wait_seconds: float
    mfu: float | None
    memory_bytes: int
    skipped_steps: int
    data: Mapping[str, int]
    norms: Mapping[str, float] = field(default_factory=dict)
    mixture: Mapping[str, float] = field(default_factory=dict)
    memory_by_rank: Mapping[str, int] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Plain containers, without mappings that have nothing in them."""
        return {name: value for name, value in asdict(self).items() if value != {}}


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a sink may know of the run when it opens. `config`: resolved, plain Python containers; ask_to_stop: makes
    the run save and end, for the reason given; from any thread."""

    name: str
    directory: Path
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    total_steps: int
    first_step: int
    ask_to_stop: Callable[[str], None] = lambda reason: None


class Sink(Protocol):
    """See the module's docstring."""

    def open(self, run: RunInfo) -> None: ...

    def log(self, info: StepInfo) -> None: ...

    def log_evaluation(self, step: int, metrics: Mapping[str, float | str]) -> None: ...

    def event(self, step: int, message: str) -> None: ...

    def close(self, status: str) -> None: ...
