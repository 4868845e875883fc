"""The composition root: builds everything by name, in order. The order of building *is* the documentation."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from trainer import distributed
from trainer.build import build, check_parts
from trainer.checkpoint.load import load, newest
from trainer.config import Config, config_to_dict, to_config
from trainer.data.loader import Loader
from trainer.engine.ds_config import make_ds_config
from trainer.evaluate import Evaluation, evaluate
from trainer.guards.signals import listening
from trainer.initial import initialise
from trainer.loop import Training, blank_of, fit
from trainer.metrics import RunInfo
from trainer.metrics.meter import Meter, peak_flops
from trainer.metrics.sinks import JsonLinesSink, SafeSinks
from trainer.parts import check_evaluation, check_fit, first_sample, make_engine, make_task, make_tokenizer
from trainer.plan import make_plan
from trainer.run_directory import RunDirectory
from trainer.schedule import Schedule
from trainer.state import TrainState
from trainer.summary import summarise


def run(config: Config, overrides: Sequence[str]) -> int:
    """Train, evaluate and save one run; returns the exit code. Raises the errors of `trainer.errors`."""
    check_parts(config)
    with distributed.process_group(always=config.engine.kind == "zero"), listening() as stop_request:
        config = to_config(distributed.broadcast_object(config_to_dict(config)))
        plan = make_plan(config, distributed.world_size())
        directory = RunDirectory.of(config)
        distributed.on_rank_zero(lambda: directory.check(config))

        data = build(config.data, "data")
        config, tokenizer = make_tokenizer(config, data, directory)
        task = make_task(config, tokenizer)
        distributed.on_rank_zero(lambda: check_evaluation(config, plan, data, task))
        total = config.steps if config.schedule["unit"] == "steps" else config.stop.tokens or 0
        schedule: Schedule = build(config.schedule, "schedule", total=total)

        def build_model() -> torch.nn.Module:
            model: torch.nn.Module = build(config.model, "model")
            return model

        with torch.device("meta"):
            check_fit(config, task, build_model(), tokenizer)
        loader = Loader(data, task, plan, distributed.rank(), config.seed, config.stop.epochs)
        blank = blank_of(task.collate([first_sample(data, task)]))
        checkpoint = newest(directory.checkpoints)
        distributed.on_rank_zero(
            lambda: directory.claim(config, overrides, plan.to_dict(), make_ds_config(plan), tokenizer)
        )

        engine = make_engine(config, plan, build_model)
        if checkpoint is None:
            initialise(engine, build_model, config.seed)
            state, lanes = TrainState(), {}
        else:
            load(checkpoint, engine)
            state, lanes = checkpoint.state, dict(checkpoint.lanes)
            loader.load_lane_states(lanes)

        sinks = SafeSinks([])
        if distributed.rank() == 0:
            print(summarise(config, plan, engine, schedule, directory, state), flush=True)
            sinks = SafeSinks(
                [JsonLinesSink(), *(build(part, f"logging.{name}") for name, part in config.logging.items())]
            )
            info = RunInfo(
                config.name, directory.path, config_to_dict(config), plan.to_dict(), config.steps, state.step
            )
            sinks.open(info)
            directory.status("running", state.step, "training")
        trace = directory.open_trace(distributed.rank(), state.step) if data.trace else None
        meter = Meter(time.perf_counter, peak_flops(_device_name()))
        training = Training(
            config, plan, directory, task, data, loader, engine, schedule, meter, sinks, stop_request, trace, blank
        )
        state, outcome = fit(training, state, lanes)
        loader.close()
        if outcome.status == "finished" and config.eval.final_split != "none":
            final = Evaluation(config.eval.final_split, None, plan, generate=True, final=True)
            sinks.log_evaluation(state.step, evaluate(engine, task, data, final, directory.path, state.step))
        if distributed.rank() == 0:
            sinks.event(state.step, f"{outcome.status}: {outcome.reason}")
            sinks.close(outcome.status)
            directory.status(outcome.status, state.step, outcome.reason, outcome.exit_code)
        return outcome.exit_code


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
