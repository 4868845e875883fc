"""Losses and gradients that are not finite, or far above the usual, are noticed before an update that they would spoil.

Every decision is a pure function of the configuration, the `TrainState` and values that are equal on all ranks, so all
ranks take the same one. What was usual is part of the state: a resumed run decides as an uninterrupted one.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from trainer import distributed
from trainer.checkpoint.load import Checkpoint, load, newest, set_aside
from trainer.config import Config, GuardConfig, OnAnomaly, Precision
from trainer.engine.base import Engine
from trainer.engine.optimizer_state import passes
from trainer.metrics.json_lines import JsonLines
from trainer.metrics.norms import Norms
from trainer.metrics.sinks import SafeSinks
from trainer.run_directory import RunDirectory
from trainer.state import TrainState

WINDOW = 100
"""Steps whose losses and norms are the usual ones, and over which anomalies are counted."""

LOWEST_SCALE = 1.0
"""To which DeepSpeed lowers the loss scale of fp16 by halves, and no further."""

ALARM_STEPS = 20
"""Steps in a row at the lowest loss scale that are told; to come down to it takes 16 overflows."""

ENOUGH = 10
"""Steps without which nothing is usual yet."""


@dataclass(frozen=True, slots=True)
class Update:
    """What became of one step's update; equal on all ranks.

    loss: of the global batch per target token; None where nobody looked. anomaly: why there was no update; None: there
    was one, or fp16 lowers its loss scale, which is no anomaly. threshold: what a spike was above. loss_scale: of fp16,
    after the step; None in other precisions.
    """

    grad_norm: float
    loss: float | None = None
    anomaly: str | None = None
    threshold: float | None = None
    loss_scale: float | None = None

    def __str__(self) -> str:
        above = "" if self.threshold is None else f", above {self.threshold:.4g}"
        return f"{self.anomaly} (loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}{above})"


def update(
    engine: Engine, config: Config, state: TrainState, lr: float, loss_sum: torch.Tensor, target_tokens: int, told: bool
) -> Update:
    """The optimizer's step after `state`, unless loss or gradient are anomalous; loss_sum: of this rank. told: the step
    will be logged.

    The loss is looked at under `guard.spike_factor` only, for it takes an exchange: one that is not finite mostly gives
    a gradient that is not finite.
    """
    max_loss = max_norm = math.inf
    loss = None
    if config.guard.spike_factor is not None:
        max_loss, max_norm = (_limit(config.guard.spike_factor, usual) for usual in (state.losses, state.grad_norms))
        loss = _global_loss(loss_sum, target_tokens)
    loss_passes = loss is None or passes(loss, max_loss)
    norm = engine.step(lr, max_norm if loss_passes else -math.inf, measure=told and config.log.norms != Norms.none)
    scale = engine.scalars()["loss_scale"] if config.precision == Precision.fp16 else None
    if loss_passes and (passes(norm, max_norm) or _lowers_its_scale(scale, norm)):
        return Update(norm, loss, loss_scale=scale)
    loss = _global_loss(loss_sum, target_tokens) if loss is None else loss
    if not (math.isfinite(norm) and math.isfinite(loss)):
        return Update(norm, loss, "not finite", loss_scale=scale)
    kind, threshold = ("gradient spike", max_norm) if loss_passes else ("loss spike", max_loss)
    return Update(norm, loss, kind, threshold, scale)


def _limit(factor: float, usual: Sequence[float]) -> float:
    return factor * statistics.median(usual) if len(usual) >= ENOUGH else math.inf


def _global_loss(loss_sum: torch.Tensor, target_tokens: int) -> float:
    return distributed.all_reduce_sum([float(loss_sum)])[0] / max(target_tokens, 1)


def _lowers_its_scale(scale: float | None, norm: float) -> bool:
    """Whether this is an overflow that fp16 meets with a lower loss scale; at the lowest, it is an anomaly."""
    return scale is not None and not math.isfinite(norm) and scale > LOWEST_SCALE


def remember(guard: GuardConfig, state: TrainState, made: Update) -> TrainState:
    """`state`, the one after the step, with what the next decisions need to know of it."""
    lowest = made.loss_scale is not None and made.loss_scale <= LOWEST_SCALE
    state = replace(state, lowest_scale_steps=state.lowest_scale_steps + 1 if lowest else 0)
    if made.anomaly is not None:
        return replace(state, anomalies=(*_recent(guard, state), state.step))
    if guard.spike_factor is None or made.loss is None or not math.isfinite(made.grad_norm):
        return state
    losses, norms = (*state.losses, made.loss), (*state.grad_norms, made.grad_norm)
    return replace(state, losses=losses[-WINDOW:], grad_norms=norms[-WINDOW:])


def scale_alarm(state: TrainState) -> str | None:
    """What to tell where fp16's loss scale has just been at its lowest for too long."""
    if state.lowest_scale_steps != ALARM_STEPS:
        return None
    return (
        f"precision=fp16: the loss scale has been at its lowest, {LOWEST_SCALE:g}, for {ALARM_STEPS} steps; gradients"
        " overflow, and small ones are lost. Train under another name=... with precision=bf16, or with a lower"
        " optimizer.lr."
    )


def _recent(guard: GuardConfig, state: TrainState) -> tuple[int, ...]:
    """The anomalies that count. After a rollback their steps may be ahead of the state's."""
    window = max(WINDOW, guard.max_anomalies + 1)
    return tuple(step for step in state.anomalies if step > state.step - window)


@dataclass(frozen=True, slots=True)
class Reaction:
    """end: why the run must end at the state before the step; restored: the state of the checkpoint that was gone back
    to; neither: the step counts, without an update."""

    end: str | None = None
    restored: TrainState | None = None


def react(
    guard: GuardConfig,
    state: TrainState,
    made: Update,
    ids: Sequence[str],
    engine: Engine,
    directory: RunDirectory,
    sinks: SafeSinks,
) -> Reaction:
    """Do what `guard.on_anomaly` asks for about the step after `state`, and write it down; all ranks call it together.

    ids: this rank's samples in the step. A save that is under way must have been finished.
    """
    step, recent = state.step + 1, (*_recent(guard, state), state.step + 1)
    checkpoint, action, reaction = None, "skip", Reaction()
    if len(recent) > guard.max_anomalies:
        count = f"{len(recent)} in the last {WINDOW} steps, and guard.max_anomalies={guard.max_anomalies}"
        action, reaction = "stop", Reaction(end=f"step {step}: {made}; {count}. anomalies.jsonl names the samples.")
    elif guard.on_anomaly == OnAnomaly.stop:
        end = f"step {step}: {made}; guard.on_anomaly=stop. anomalies.jsonl names the samples."
        action, reaction = "stop", Reaction(end=end)
    elif guard.on_anomaly == OnAnomaly.rollback:
        checkpoint = distributed.on_rank_zero(lambda: newest(directory.checkpoints))
    if checkpoint is not None:
        _go_back(checkpoint, engine, directory)
        restored = replace(checkpoint.state, seconds=state.seconds, anomalies=recent)
        action, reaction = f"rollback to step {restored.step}", Reaction(restored=restored)
    everywhere = distributed.all_gather_objects(list(ids))
    if distributed.rank() == 0:
        _write_down(directory, step, made, action, list(itertools.chain.from_iterable(everywhere)))
        now = reaction.restored or state  # no event is ahead of the steps that follow it: a resume cuts there
        sinks.alarm(now.step, f"step {step}: {made}: {action}")
    return reaction


def _go_back(checkpoint: Checkpoint, engine: Engine, directory: RunDirectory) -> None:
    step = checkpoint.state.step
    load(checkpoint, engine)
    distributed.on_rank_zero(lambda: set_aside(directory.checkpoints, step))
    directory.rewind(distributed.rank(), step)


def _write_down(directory: RunDirectory, step: int, made: Update, action: str, ids: list[str]) -> None:
    """A line in anomalies.jsonl, which is never cut: a step that a crash makes the run repeat stands there twice."""
    lines = JsonLines(directory.path / "anomalies.jsonl", last_step=math.inf)
    values = {"loss": made.loss, "grad_norm": made.grad_norm, "threshold": made.threshold}
    lines.write({"step": step, "kind": made.anomaly, **values, "action": action, "ids": ids})
    lines.close()
