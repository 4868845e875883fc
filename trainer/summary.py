"""What a person wants to know before the first step, on one screen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from trainer import distributed
from trainer.build import build
from trainer.config import Config
from trainer.engine.ds_config import make_ds_config
from trainer.parallel.split import check_split
from trainer.plan import RunPlan, make_plan
from trainer.run_directory import RunDirectory
from trainer.schedule import Schedule
from trainer.state import TrainState


def summarise(
    config: Config,
    plan: RunPlan,
    parameters: int,
    schedule: Schedule,
    directory: RunDirectory,
    state: TrainState,
    predicted: str | None = None,
) -> str:
    """Model, batch arithmetic, learning rate, precision, engine, data, run directory; one fact a line. predicted: what
    it is expected to take."""
    shared = plan.sequence_parallel * plan.tensor_parallel
    ranks = f"{plan.data_parallel} ranks" if shared == 1 else f"{plan.data_parallel} groups of {shared} ranks"
    if plan.micro_tokens is None:
        split = f"{plan.global_size} = {plan.micro_size} micro x {plan.accumulation} accumulation x {ranks}"
    else:
        split = f"{plan.global_size} in micro-batches of at most {plan.micro_tokens} tokens on {ranks}"
    lr = config.optimizer["lr"]
    last = config.steps - 1 if schedule.unit == "steps" else config.stop.tokens or 0
    warmup = config.schedule.get("warmup", 0)
    engine_name = f"ZeRO stage {plan.zero_stage}" if plan.engine == "zero" else "plain PyTorch"
    offload = [
        f"{what} in {'host memory' if where == 'cpu' else plan.nvme_path}"
        for what, where in (("optimizer", plan.offload_optimizer), ("parameters", plan.offload_parameters))
        if where != "none"
    ]
    sharing = [
        f"{what} of a layer shared by {number} ranks"
        for what, number in (("positions", plan.sequence_parallel), ("matrices", plan.tensor_parallel))
        if number > 1
    ]
    rows = {
        "model": f"{_short(config.model['_target_'])}, {parameters:,} parameters",
        "global batch": f"{split} (samples)",
        "length": f"{config.steps:,} steps",
        "learning rate": f"{lr * schedule.factor(0):.3g} first, {lr * schedule.factor(warmup):.3g} after {warmup}"
        f" {schedule.unit} of warm-up, {lr * schedule.factor(last):.3g} last ({_short(config.schedule['_target_'])})",
        "optimizer": _short(config.optimizer["_target_"]),
        "precision": str(config.precision),
        "engine": ", ".join((engine_name, *offload, *sharing)),
        "device": f"{plan.world_size} x {distributed.device().type}",
        "data": _told_data(config.data),
        "run directory": str(directory.path),
    }
    if predicted is not None:
        rows["predicted"] = predicted
    if state.step:
        rows["resuming"] = f"after step {state.step:,} ({state.tokens:,} target tokens, epoch {state.epoch:.2f})"
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def count_parameters(model: torch.nn.Module) -> int:
    """Elements of all parameters, a tied one once."""
    return sum(parameter.numel() for parameter in model.parameters())


def total_progress(config: Config) -> float:
    """The length of the run in the schedule's unit."""
    return config.steps if config.schedule.get("unit", "steps") == "steps" else config.stop.tokens or 0


def dry_run(config: Config, predicted: str | None = None) -> str:
    """What `config` would do on the WORLD_SIZE ranks of the environment: the summary, plan.json and ds_config.json.

    The model is built on the meta device; no data are opened, nothing is written. Raises ConfigError like the run
    itself.
    """
    plan = make_plan(config, distributed.launched_ranks())
    with torch.device("meta"):
        parameters = count_parameters(build(config.model, "model"))
    check_split(partial(build, config.model, "model"), plan)
    schedule: Schedule = build(config.schedule, "schedule", total=total_progress(config))
    text = summarise(config, plan, parameters, schedule, RunDirectory.of(config), TrainState(), predicted)
    plans = {"plan.json": plan.to_dict(), "ds_config.json": make_ds_config(plan)}
    return "\n".join([text, *(f"{name}: {json.dumps(content, indent=1)}" for name, content in plans.items())])


def _told_data(data: Mapping[str, Any]) -> str:
    """Where the records come from."""
    sources = data.get("sources") or {"": data}
    places = [source.get("path") or source["source"]["_target_"] for source in sources.values()]
    return ", ".join(map(str, places))


def _short(target: str) -> str:
    return target.rpartition(".")[2]
