"""What a person wants to know before the first step, on one screen."""

from __future__ import annotations

import math

from trainer import distributed
from trainer.config import Config
from trainer.engine.base import Engine
from trainer.plan import RunPlan
from trainer.run_directory import RunDirectory
from trainer.schedule import Schedule
from trainer.state import TrainState


def summarise(
    config: Config, plan: RunPlan, engine: Engine, schedule: Schedule, directory: RunDirectory, state: TrainState
) -> str:
    """Model, batch arithmetic, learning rate, precision, engine, data, run directory; one fact a line."""
    parameters = sum(
        math.prod(getattr(parameter, "ds_shape", parameter.shape)) for parameter in engine.module.parameters()
    )
    if plan.micro_tokens is None:
        split = (
            f"{plan.global_size} = {plan.micro_size} micro x {plan.accumulation} accumulation x {plan.world_size} ranks"
        )
    else:
        split = f"{plan.global_size} in micro-batches of at most {plan.micro_tokens} tokens on {plan.world_size} ranks"
    lr = config.optimizer["lr"]
    last = config.steps - 1 if schedule.unit == "steps" else config.stop.tokens or 0
    warmup = config.schedule.get("warmup", 0)
    engine_name = f"ZeRO stage {plan.zero_stage}" if plan.engine == "zero" else "plain PyTorch"
    offload = [
        what for what, on in (("optimizer", plan.offload_optimizer), ("parameters", plan.offload_parameters)) if on
    ]
    rows = {
        "model": f"{_short(config.model['_target_'])}, {parameters:,} parameters",
        "global batch": f"{split} (samples)",
        "length": f"{config.steps:,} steps",
        "learning rate": f"{lr * schedule.factor(0):.3g} first, {lr * schedule.factor(warmup):.3g} after {warmup}"
        f" {schedule.unit} of warm-up, {lr * schedule.factor(last):.3g} last ({_short(config.schedule['_target_'])})",
        "optimizer": _short(config.optimizer["_target_"]),
        "precision": str(config.precision),
        "engine": engine_name + (f", {' and '.join(offload)} in host memory" if offload else ""),
        "device": f"{plan.world_size} x {distributed.device().type}",
        "data": f"{config.data['path']}",
        "run directory": str(directory.path),
    }
    if state.step:
        rows["resuming"] = f"after step {state.step:,} ({state.tokens:,} target tokens, epoch {state.epoch:.2f})"
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _short(target: str) -> str:
    return target.rpartition(".")[2]
