"""The training loop: fetch, agree, learn, report, evaluate, save; until there is a reason to stop."""

from __future__ import annotations

import itertools
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trainer import distributed, garbage, privacy, sections
from trainer.checkpoint.save import Checkpointer
from trainer.config import Config
from trainer.data.corpus import Corpus
from trainer.data.loader import NO_BATCH, Loader, StepBatch
from trainer.engine.base import Engine
from trainer.errors import AnomalyError, DataError, UserError
from trainer.evaluate import Evaluation, evaluate
from trainer.guards import anomalies
from trainer.guards.signals import PREEMPTED, StopRequest
from trainer.metrics import StepInfo
from trainer.metrics.json_lines import JsonLines
from trainer.metrics.meter import Meter
from trainer.metrics.norms import LayerGroups
from trainer.metrics.sinks import SafeSinks
from trainer.parallel.layout import Layout
from trainer.parallel.sequence import own_part
from trainer.plan import RunPlan
from trainer.run_directory import RunDirectory
from trainer.schedule import Schedule
from trainer.state import TrainState
from trainer.tasks import IGNORE, Batch, Task


@dataclass(frozen=True, slots=True)
class Training:
    """Everything a run is made of, built by `trainer.main`."""

    config: Config
    plan: RunPlan
    layout: Layout
    directory: RunDirectory
    task: Task
    corpus: Corpus
    loader: Loader
    engine: Engine
    checkpointer: Checkpointer
    schedule: Schedule
    meter: Meter
    sinks: SafeSinks
    stop_request: StopRequest
    groups: LayerGroups  # of the parameters whose gradients are measured
    trace: JsonLines | None  # the ids of all samples, under data.trace
    quarantine: JsonLines | None  # on rank 0: the records that gave no sample
    blank: Batch  # a micro-batch without labels, for ranks that have no data in a step


@dataclass(frozen=True, slots=True)
class Outcome:
    """How `fit` ended: status and reason for status.json, and the exit code; error: what a failed run raises."""

    status: str
    reason: str
    exit_code: int
    error: UserError | None = None


@dataclass(frozen=True, slots=True)
class _StepTotals:
    """What all ranks agree on before a step. `micro_batches`: how many every rank runs; `seconds`, `signalled`,
    `wished`, `broken`: of any rank; `written`: a checkpoint waits for nothing but its commit."""

    target_tokens: int
    samples: int
    epoch: float
    exhausted: bool
    rejected: int
    micro_batches: int
    seconds: float
    signalled: bool
    wished: bool
    broken: bool
    written: bool


def due(step: int, every: int) -> bool:
    """True at every `every`-th step; never when `every` is 0."""
    return every > 0 and step % every == 0


def fit(training: Training, state: TrainState, lanes: Mapping[int, Any]) -> tuple[TrainState, Outcome]:
    """Train from `state` until a reason to stop, and leave a checkpoint of the last step.

    lanes: positions of this rank's data lanes at `state`. Called by all ranks together; all return the same. Where the
    data of any rank broke, all raise after the checkpoint: that rank what broke them, the others DataError.
    Where loss or gradients end the run, all raise AnomalyError after the checkpoint of the step before.
    """
    config, batches = training.config, iter(training.loader)
    batch, begin_step, saved_at = NO_BATCH, state.step, state.seconds
    while (outcome := _reached_end(config, state)) is None:
        fetch_started = time.perf_counter()
        sections.enter("data", state.step + 1)
        batch = next(batches)
        wait_seconds = time.perf_counter() - fetch_started
        if state.step == begin_step > 0:
            training.sinks.event(state.step, f"resumed: the data were there again after {wait_seconds:.1f} s")
        told = batch if training.layout.speaks else NO_BATCH  # ranks that share samples count them once
        totals = _agree(batch, told, state, training)
        if (outcome := _interrupted(config, totals, batch, training.stop_request)) is not None:
            break
        lr = config.optimizer["lr"] * training.schedule.factor(_progress(training.schedule, state))
        logs = due(state.step + 1, config.log.every) or state.step == 0
        loss_sum, made = _learn(training, batch, totals, lr, state, logs)
        if totals.written:
            sections.enter("commit", state.step + 1)
            training.checkpointer.commit()
        if made.anomaly is not None:
            reaction = _react(training, state, told, made)
            if reaction.end is not None:
                outcome = Outcome("failed", reaction.end, AnomalyError.exit_code, AnomalyError(reaction.end))
                break
            if reaction.restored is not None:
                state, lanes, begin_step = reaction.restored, batch.lane_states, 0
                continue
        lanes = batch.lane_states
        seconds = time.perf_counter() - fetch_started
        state = state.advance(totals.target_tokens, totals.samples, totals.epoch, seconds)
        state = anomalies.remember(config.guard, state, made)
        if (alarm := anomalies.scale_alarm(state)) is not None:
            training.sinks.alarm(state.step, alarm)
        _measure(training, told, totals, wait_seconds)
        if training.trace is not None:
            training.trace.write({"step": state.step, "rank": distributed.rank(), "ids": batch.ids})
        if totals.rejected:
            _quarantine(training, told, state.step)
        if logs:
            training.sinks.log(_report(training, state, totals, told, loss_sum, made.grad_norm, lr))
        if due(state.step, config.eval.every):
            state = _evaluate(training, state, lanes)
        if due(state.step, config.checkpoint.every) or _long_ago(config, totals, saved_at):
            _save(training, state, lanes)
            saved_at = totals.seconds
        garbage.collect(state.step)
    if state.step > 0:
        _save(training, state, lanes)
        training.checkpointer.require()
    if outcome.status == "failed":
        assert outcome.error is not None, "a failure has its error"
        raise batch.failure or outcome.error
    return state, outcome


def _reached_end(config: Config, state: TrainState) -> Outcome | None:
    """The ends that every rank sees in its own copy of the state."""
    stop = config.stop
    if state.step >= config.steps:
        return Outcome("finished", f"steps: {state.step} of {config.steps}", 0)
    if stop.tokens is not None and state.tokens >= stop.tokens:
        return Outcome("finished", f"stop.tokens: {state.tokens} of {stop.tokens} target tokens", 0)
    if stop.patience is not None and state.stale_evaluations >= stop.patience:
        reason = f"converged: no improvement since step {state.best_step} for stop.patience={stop.patience} evaluations"
        return Outcome("finished", reason, 0)
    return None


def _interrupted(config: Config, totals: _StepTotals, batch: StepBatch, request: StopRequest) -> Outcome | None:
    """The ends that ranks must agree on: data that broke, the clock, a signal or a wish, the end of the data."""
    if totals.broken:
        reasons = distributed.all_gather_objects(None if batch.failure is None else str(batch.failure))
        broken = "; ".join(f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason is not None)
        error = DataError(f"the data cannot be read further; {broken}")
        return Outcome("failed", str(error), error.exit_code, error)
    if totals.wished:  # exit code 0: no launcher shall start it again
        return Outcome("preempted", f"a stop was asked for by {request.wish or 'another rank'}", 0)
    if totals.signalled:
        return Outcome("preempted", "a signal asked for a stop", PREEMPTED)
    if config.stop.minutes is not None and totals.seconds >= 60 * config.stop.minutes:
        return Outcome("finished", f"stop.minutes: {totals.seconds / 60:.1f} of {config.stop.minutes:g}", 0)
    if totals.exhausted:
        key = "stop.epochs" if config.stop.epochs is not None else "data.sources"
        return Outcome("finished", f"{key}: {totals.epoch:g} passes over the data", 0)
    return None


def _long_ago(config: Config, totals: _StepTotals, saved_at: float) -> bool:
    """Whether `checkpoint.minutes` of training have passed since the last save, by the clock that ranks agree on."""
    minutes = config.checkpoint.minutes
    return minutes is not None and totals.seconds - saved_at >= 60 * minutes


def _agree(batch: StepBatch, told: StepBatch, state: TrainState, training: Training) -> _StepTotals:
    """One exchange a step: how much every rank brings, and whether any rank wants to stop. told: what counts of the
    batch."""
    sections.enter("agree", state.step + 1)
    local = (
        told.num_target_tokens,
        told.num_samples,
        told.epoch,
        0.0 if batch.exhausted else 1.0,
        len(told.rejected),
    )
    target_tokens, samples, epochs, with_data, rejected = distributed.all_reduce_sum(local)
    wish = (
        len(batch.micro_batches),
        state.seconds,
        float(training.stop_request.name is not None),
        float(training.stop_request.wish is not None),
        float(batch.failure is not None),
        float(not training.checkpointer.written),
    )
    micro_batches, seconds, signalled, wished, broken, unwritten = distributed.all_reduce_max(wish)
    return _StepTotals(
        target_tokens=int(target_tokens),
        samples=int(samples),
        epoch=epochs / training.layout.data,
        exhausted=with_data == 0,
        rejected=int(rejected),
        micro_batches=int(micro_batches),
        seconds=seconds,
        signalled=signalled > 0,
        wished=wished > 0,
        broken=broken > 0,
        written=unwritten == 0,
    )


def _progress(schedule: Schedule, state: TrainState) -> float:
    return state.step if schedule.unit == "steps" else state.tokens


def _learn(
    training: Training, batch: StepBatch, totals: _StepTotals, lr: float, state: TrainState, logs: bool
) -> tuple[torch.Tensor, anomalies.Update]:
    """One optimizer step; returns this rank's summed objective (a scalar on the device) and what became of the update.
    logs: it will be reported.

    Dropout is a pure function of (seed, step, rank), so a resumed run draws what an uninterrupted one would have drawn;
    ranks that share matrices draw the same.
    """
    seed = hash((training.config.seed, state.step, training.layout.shard_rank)) & 0x7FFF_FFFF_FFFF_FFFF
    torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a stack trace for each accelerator not there
    if distributed.device().type == "cuda":
        torch.cuda.manual_seed(seed)
    loss_sum = torch.zeros((), device=distributed.device())
    for index, micro_batch in enumerate(_even(batch.micro_batches, totals.micro_batches, training.blank)):
        sections.enter("forward", state.step + 1)
        sums = training.engine.forward_backward(
            training.task,
            on_device(own_part(micro_batch, training.layout)),
            scale=1.0 / max(totals.target_tokens, 1),
            last=index == totals.micro_batches - 1,
        )
        loss_sum += sums.objective.detach() / training.layout.tensor
    sections.enter("optimizer", state.step + 1)
    training.checkpointer.settle()
    told = (loss_sum, totals.target_tokens, logs)
    return loss_sum, anomalies.update(training.engine, training.config, state, lr, *told)


def _react(training: Training, state: TrainState, batch: StepBatch, made: anomalies.Update) -> anomalies.Reaction:
    started = time.perf_counter()
    sections.enter("rollback", state.step + 1)
    training.checkpointer.finish()
    facts = training.engine, training.directory, training.sinks
    reaction = anomalies.react(training.config.guard, state, made, batch.ids, *facts)
    training.meter.pause(time.perf_counter() - started)
    return reaction


def _even(micro_batches: list[Batch], count: int, blank: Batch) -> Iterator[Batch]:
    """This rank's micro-batches, and blank ones up to the number that every rank runs."""
    yield from micro_batches
    for _ in range(count - len(micro_batches)):
        yield blank


def blank_of(batch: Batch) -> Batch:
    """`batch` without labels: it weighs nothing."""
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}


def on_device(batch: Batch) -> Batch:
    """The batch on this process's device."""
    where = distributed.device()
    return batch if where.type == "cpu" else {name: t.to(where, non_blocking=True) for name, t in batch.items()}


def _measure(training: Training, batch: StepBatch, totals: _StepTotals, wait_seconds: float) -> None:
    model: Any = training.engine.module
    flops = sum(
        len(micro_batch["labels"]) * model.flops_per_sample(**training.task.flops_per_sample_lengths(micro_batch))
        for micro_batch in batch.micro_batches
    )
    training.meter.step_done(
        totals.target_tokens, batch.num_positions, batch.num_padding, wait_seconds, flops, batch.drawn
    )


def _quarantine(training: Training, batch: StepBatch, step: int) -> None:
    """Write down which records gave no sample, and why."""
    everywhere = distributed.all_gather_objects(batch.rejected)
    if training.quarantine is not None:
        for one in itertools.chain.from_iterable(everywhere):
            training.quarantine.write({"step": step, **asdict(one)})


def _report(
    training: Training,
    state: TrainState,
    totals: _StepTotals,
    batch: StepBatch,
    loss_sum: torch.Tensor,
    grad_norm: float,
    lr: float,
) -> StepInfo:
    sections.enter("log", state.step)
    meter, corpus, groups = training.meter, training.corpus, training.groups
    memory = [0.0] * distributed.world_size()
    memory[distributed.rank()] = memory_bytes()
    sums = distributed.all_reduce_sums(
        {
            "loss": [float(loss_sum)],
            "meter": [meter.positions, meter.padding, meter.flops],
            "counts": [batch.counts.get(name, 0) for name in corpus.count_names],
            "drawn": [meter.drawn[source] for source in corpus.mixed],
            "squares": groups.sums(training.engine.squares),
            "memory": memory,
        }
    )
    positions, padding, flops = sums["meter"]
    return meter.report(
        state,
        loss=sums["loss"][0] / max(totals.target_tokens, 1),
        grad_norm=grad_norm,
        lr=lr,
        target_tokens=totals.target_tokens,
        positions=positions,
        padding=padding,
        flops=flops,
        memory=[int(size) for size in sums["memory"]],
        skipped_steps=training.engine.skipped_steps,
        data={name: int(count) for name, count in zip(corpus.count_names, sums["counts"], strict=True)},
        norms=groups.norms(sums["squares"], grad_norm),
        drawn=dict(zip(corpus.mixed, sums["drawn"], strict=True)),
    )


def memory_bytes() -> int:
    """Peak memory of this process so far: allocated on the GPU, or resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _evaluate(training: Training, state: TrainState, lanes: Mapping[int, Any]) -> TrainState:
    """Evaluate on the validation split; a new best is saved at once and pointed to."""
    started = time.perf_counter()
    sections.enter("evaluate", state.step)
    config = training.config
    evaluation = evaluate(
        training.engine,
        training.task,
        training.corpus,
        Evaluation("validation", config.eval.max_samples, training.plan, config.eval.generate),
        training.directory.path,
        state.step,
    )
    training.sinks.log_evaluation(state.step, {**evaluation, **privacy.metrics(config, state.step)})
    metric, direction = training.task.headline()
    state = state.evaluated(evaluation[metric], direction)
    if state.best_step == state.step:
        _save(training, state, lanes, best=True)
    training.meter.pause(time.perf_counter() - started)
    return state


def _save(training: Training, state: TrainState, lanes: Mapping[int, Any], best: bool = False) -> None:
    """Begin to save; the step that finds every rank's part written commits it."""
    started = time.perf_counter()
    sections.enter("save", state.step)
    training.checkpointer.save(state, lanes, best)
    training.meter.pause(time.perf_counter() - started)
