"""The composition root: builds everything by name, in order. The order of building *is* the documentation."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer import distributed, garbage, privacy, sections
from trainer.build import build, check_parts
from trainer.checkpoint import step_name
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
from trainer.expectation import Expectation, expect, figures
from trainer.guards import watchdog
from trainer.guards.signals import StopRequest, listening
from trainer.host import (
    allow_many_files,
    build_beside_the_heap,
    keep_compiled_products,
    keep_freed_memory,
    return_freed_memory,
)
from trainer.initial import fill_frozen, initialise
from trainer.logs import run_log
from trainer.loop import Outcome, Training, blank_of, fit, memory_bytes
from trainer.metrics import RunInfo, Sink
from trainer.metrics.meter import Meter, peak_flops
from trainer.metrics.norms import LayerGroups
from trainer.metrics.sinks import JsonLinesSink, SafeSinks
from trainer.parallel.layout import make_layout
from trainer.parallel.split import check_split
from trainer.parts import check_evaluation, check_fit, make_corpus, make_engine, make_task, make_tokenizer
from trainer.plan import make_plan
from trainer.pretrained import first_weights
from trainer.profile import recorded
from trainer.run_directory import RunDirectory
from trainer.schedule import Schedule
from trainer.state import TrainState
from trainer.summary import count_parameters, dry_run, summarise, total_progress


def run(config: Config, overrides: Sequence[str]) -> int:
    """Train, evaluate and save one run; returns the exit code. Raises the errors of `trainer.errors`."""
    check_parts(config)
    privacy.check_budget(config)
    if config.dry_run:
        expected = expect(config, distributed.launched_ranks())
        print(dry_run(config, None if expected is None else expected.told))
        return 0
    allow_many_files()
    keep_compiled_products()
    build_beside_the_heap()
    timeout_seconds = watchdog.collective_seconds(config.guard)
    with (
        watchdog.watching(config.guard),
        distributed.process_group(config.engine.kind == "zero", timeout_seconds),
        listening() as stop_request,
        run_log(distributed.rank()) as log_to,
    ):
        config = to_config(distributed.broadcast_object(config_to_dict(config)))
        with watchdog.explaining_lost_peers():
            expected = _expected(config) if distributed.rank() == 0 else None
            training, begin, lanes = assemble(config, overrides, stop_request, log_to, expected)
        try:
            recording = recorded(config.debug, training.directory.profile, distributed.rank())
            with watchdog.explaining_lost_peers(), garbage.collected_between_steps(), recording:
                state, outcome = fit(training, begin, lanes)
                _compare(training, expected, begin, state)
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
    config: Config,
    overrides: Sequence[str],
    stop_request: StopRequest,
    log_to: Callable[[Path], None],
    expected: Expectation | None = None,
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
    loader = Loader(dealers, task, plan, stream.row_lengths, mixed=corpus.mixed, mix_by=data.mix_by)
    blank = blank_of(task.collate([corpus.first_sample()]))

    sinks = _make_sinks(config)
    ds_config = make_ds_config(plan)
    planned = plan.to_dict() | figures(expected)
    distributed.on_rank_zero(lambda: directory.claim(config, overrides, planned, ds_config, tokenizer))
    log_to(directory.log(distributed.rank()))
    engine = make_engine(config, plan, build_model, layout)
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
    return_freed_memory()
    keep_freed_memory()
    if distributed.rank() == 0:
        told = None if expected is None else expected.told
        print(summarise(config, plan, count_parameters(twin), schedule, directory, state, told), flush=True)
        facts = config_to_dict(config), planned
        sinks.open(RunInfo(config.name, directory.path, *facts, config.steps, state.step, stop_request.ask))
        watchdog.last_words(lambda: sinks.close("failed"))
        directory.status("running", state.step, "training")
    trace = directory.open_trace(distributed.rank(), state.step) if data.trace and layout.speaks else None
    quarantine = directory.open_quarantine(state.step) if distributed.rank() == 0 else None
    device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    meter = Meter(time.perf_counter, peak_flops(device_name))
    saved, copier = partial(_tell_saved, directory, sinks), make_copier(config, directory)
    checkpointer = Checkpointer(directory.checkpoints, engine, plan.to_dict(), config.checkpoint, saved, copier)
    facts_of_run = config, plan, layout, directory, task, corpus, loader, engine, checkpointer, schedule, meter
    trained = [name for name, parameter in twin.named_parameters() if parameter.requires_grad]
    groups = LayerGroups(trained, config.log.norms)
    return Training(*facts_of_run, sinks, stop_request, groups, trace, quarantine, blank), state, lanes


def _make_sinks(config: Config) -> SafeSinks:
    """On rank 0 those of the configuration, which refuse what they cannot do; every rank hears of it."""
    made: list[Sink] = [JsonLinesSink()] if distributed.rank() == 0 else []
    distributed.on_rank_zero(
        lambda: made.extend(build(part, f"logging.{name}") for name, part in config.logging.items())
    )
    return SafeSinks(made)


def _expected(config: Config) -> Expectation | None:
    """What the run should take; a warning, where that is more than there is, comes before anything is built."""
    expected = expect(config, distributed.world_size())
    if expected is not None and expected.warning is not None:
        print(f"warning: {expected.warning}", file=sys.stderr, flush=True)
    return expected


def _compare(training: Training, expected: Expectation | None, begin: TrainState, state: TrainState) -> None:
    """Tell what was predicted beside what was measured, in training, evaluations and saves together."""
    (measured,) = distributed.all_reduce_max([memory_bytes()])
    if expected is not None and state.step > begin.step:
        seconds = (state.seconds - begin.seconds) / (state.step - begin.step)
        training.sinks.event(state.step, expected.beside(measured, seconds))


def _tell_saved(directory: RunDirectory, sinks: SafeSinks, step: int, failure: str | None) -> None:
    if failure is None:
        directory.status("running", step, "saved a checkpoint")
        sinks.saved(step, directory.checkpoints / step_name(step))
    else:
        sinks.alarm(step, failure)


def evaluate_finally(training: Training, state: TrainState, again: bool) -> None:
    """Evaluate the final split into evaluation.json; not `again` for a run that had ended before and was only called
    again."""
    config, directory = training.config, training.directory
    split = config.eval.final_split
    if split == "none" or (again and directory.evaluation.exists()):
        return
    sections.enter("evaluate", state.step)
    final = Evaluation(split, None, training.plan, generate=True, final=True)
    metrics = evaluate(training.engine, training.task, training.corpus, final, directory.path, state.step)
    spent = privacy.metrics(config, state.step)
    training.sinks.log_evaluation(state.step, {"split": split, **metrics, **spent})
