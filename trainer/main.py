"""The composition root: builds everything by name, in order. The order of building *is* the documentation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer import distributed, garbage, privacy
from trainer.build import build, check_parts
from trainer.checkpoint.copies import begin, make_copier
from trainer.checkpoint.load import load, set_aside
from trainer.checkpoint.save import Checkpointer
from trainer.config import Config, config_to_dict, to_config
from trainer.data.corpus import Stream
from trainer.data.dealers import make_dealers
from trainer.data.loader import Loader
from trainer.engine.ds_config import make_ds_config
from trainer.errors import PeerError
from trainer.evaluate import Evaluation, evaluate
from trainer.guards import watchdog
from trainer.guards.signals import StopRequest, listening
from trainer.host import keep_freed_memory, return_freed_memory
from trainer.initial import fill_frozen, initialise
from trainer.logs import run_log
from trainer.loop import Outcome, Training, blank_of, fit
from trainer.metrics import RunInfo
from trainer.metrics.meter import Meter, peak_flops
from trainer.metrics.sinks import JsonLinesSink, SafeSinks
from trainer.parallel.layout import make_layout
from trainer.parallel.split import check_split
from trainer.parts import check_evaluation, check_fit, make_corpus, make_engine, make_task, make_tokenizer
from trainer.plan import make_plan
from trainer.pretrained import first_weights
from trainer.run_directory import RunDirectory
from trainer.schedule import Schedule
from trainer.state import TrainState
from trainer.summary import count_parameters, dry_run, summarise, total_progress


def run(config: Config, overrides: Sequence[str]) -> int:
    """Train, evaluate and save one run; returns the exit code. Raises the errors of `trainer.errors`."""
    check_parts(config)
    privacy.check_budget(config)
    if config.dry_run:
        print(dry_run(config))
        return 0
    keep_freed_memory()
    timeout_seconds = watchdog.collective_seconds(config.guard)
    with (
        watchdog.watching(config.guard),
        distributed.process_group(config.engine.kind == "zero", timeout_seconds),
        listening() as stop_request,
        run_log(distributed.rank()) as log_to,
    ):
        config = to_config(distributed.broadcast_object(config_to_dict(config)))
        with watchdog.explaining_lost_peers():
            training, begin, lanes = assemble(config, overrides, stop_request, log_to)
        try:
            with watchdog.explaining_lost_peers(), garbage.collected_between_steps():
                state, outcome = fit(training, begin, lanes)
                if outcome.status == "finished":
                    evaluate_finally(training, state, again=state.step == begin.step)
            training.sinks.event(state.step, f"{outcome.status}: {outcome.reason}")
        except BaseException as error:
            reason = str(error) if isinstance(error, PeerError) else f"{type(error).__name__}: {error}"
            outcome = Outcome("failed", reason, getattr(error, "exit_code", 1))
            raise
        finally:
            training.loader.close()
            for lines in (training.trace, training.quarantine):
                if lines is not None:
                    lines.close()
            if distributed.rank() == 0:  # before W&B takes its time: a launcher may end what is left of a job
                training.directory.conclude(outcome.status, outcome.reason, outcome.exit_code)
            training.sinks.close(outcome.status)
        return outcome.exit_code


def assemble(
    config: Config, overrides: Sequence[str], stop_request: StopRequest, log_to: Callable[[Path], None]
) -> tuple[Training, TrainState, dict[int, Any]]:
    """Everything `fit` needs, and where it begins. Whatever can be refused is refused before the first file is
    written."""
    plan = make_plan(config, distributed.world_size())
    directory = RunDirectory.of(config)
    checkpoint = distributed.on_rank_zero(lambda: begin(config, directory))
    watchdog.attach(directory)

    data = build(config.data, "data")
    config, tokenizer = make_tokenizer(config, data, directory)
    task = make_task(config, tokenizer)
    corpus = make_corpus(config, data, tokenizer, task)
    distributed.on_rank_zero(lambda: check_evaluation(config, plan, corpus))
    schedule: Schedule = build(config.schedule, "schedule", total=total_progress(config))
    build_model = partial(build, config.model, "model")
    with torch.device("meta"):
        twin = build_model()
    check_fit(config, task, twin, tokenizer)
    check_split(build_model, plan)
    frozen = any(not parameter.requires_grad for parameter in twin.parameters())
    start_id = getattr(task, "start_id", None)
    weights = first_weights(config, twin, tokenizer, start_id) if checkpoint is None or frozen else None
    stream = Stream(corpus, config.seed, config.batch.global_size, config.stop.epochs)
    layout = make_layout(plan.sequence_parallel, plan.tensor_parallel)
    dealers = make_dealers(stream, layout.data_rank, layout.data)
    loader = Loader(dealers, task, plan, stream.row_lengths)
    blank = blank_of(task.collate([corpus.first_sample()]))

    ds_config = make_ds_config(plan)
    distributed.on_rank_zero(lambda: directory.claim(config, overrides, plan.to_dict(), ds_config, tokenizer))
    log_to(directory.log(distributed.rank()))
    engine = make_engine(config, plan, build_model, layout)
    return_freed_memory()
    state, lanes = TrainState(), {}
    if checkpoint is None:
        initialise(engine, build_model, config.seed, weights)
    else:
        load(checkpoint, engine)
        state, lanes = checkpoint.state, dict(checkpoint.lanes)
        loader.load_lane_states(lanes)
        distributed.on_rank_zero(lambda: set_aside(directory.checkpoints, state.step))
    if frozen and weights is not None:
        fill_frozen(engine, weights)

    sinks = SafeSinks([])
    if distributed.rank() == 0:
        print(summarise(config, plan, count_parameters(twin), schedule, directory, state), flush=True)
        sinks = SafeSinks([JsonLinesSink(), *(build(part, f"logging.{name}") for name, part in config.logging.items())])
        facts = config_to_dict(config), plan.to_dict()
        sinks.open(RunInfo(config.name, directory.path, *facts, config.steps, state.step))
        directory.status("running", state.step, "training")
    trace = directory.open_trace(distributed.rank(), state.step) if data.trace and layout.speaks else None
    quarantine = directory.open_quarantine(state.step) if distributed.rank() == 0 else None
    device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    meter = Meter(time.perf_counter, peak_flops(device_name))
    told, copier = partial(_tell_saved, directory, sinks), make_copier(config, directory)
    checkpointer = Checkpointer(directory.checkpoints, engine, plan.to_dict(), config.checkpoint, told, copier)
    facts_of_run = config, plan, layout, directory, task, corpus, loader, engine, checkpointer, schedule, meter
    return Training(*facts_of_run, sinks, stop_request, trace, quarantine, blank), state, lanes


def _tell_saved(directory: RunDirectory, sinks: SafeSinks, step: int, failure: str | None) -> None:
    if failure is None:
        directory.status("running", step, "saved a checkpoint")
    else:
        sinks.event(step, failure)


def evaluate_finally(training: Training, state: TrainState, again: bool) -> None:
    """Evaluate the final split into evaluation.json; not `again` for a run that had ended before and was only called
    again."""
    config, directory = training.config, training.directory
    split = config.eval.final_split
    if split == "none" or (again and directory.evaluation.exists()):
        return
    watchdog.section("evaluate", state.step)
    final = Evaluation(split, None, training.plan, generate=True, final=True)
    metrics = evaluate(training.engine, training.task, training.corpus, final, directory.path, state.step)
    spent = privacy.metrics(config, state.step)
    training.sinks.log_evaluation(state.step, {"split": split, **metrics, **spent})
