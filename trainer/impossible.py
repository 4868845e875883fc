"""Values that have the right types and cannot be, alone or together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_LEAST = {
    **dict.fromkeys(
        (
            "seed",
            "eval.every",
            "checkpoint.every",
            "engine.stage",
            "guard.max_anomalies",
            "debug.profile_steps",
            "debug.profile_after",
        ),
        0,
    ),
    **dict.fromkeys(("steps", "log.every", "eval.max_samples", "stop.tokens", "stop.patience", "checkpoint.keep"), 1),
    **dict.fromkeys(("checkpoint.keep_every", "guard.spike_factor"), 1),
    **dict.fromkeys(("engine.sequence_parallel", "engine.tensor_parallel"), 1),
    **dict.fromkeys(("batch.global_size", "batch.micro_size", "batch.micro_tokens"), 1),
}
_TIME_OUTS = ("guard.start_seconds", "guard.step_seconds")
_PRIVACY = ("privacy.noise_multiplier", "privacy.clip_norm", "privacy.max_epsilon")
_ABOVE_ZERO = ("clip_norm", "stop.epochs", "stop.minutes", "checkpoint.minutes", *_TIME_OUTS, *_PRIVACY)


def is_run_name(name: str) -> bool:
    """Whether `name` names a folder below the runs folder, and no other place."""
    return all(re.fullmatch(r"[\w.,=+@-]{1,200}", folder) and folder.strip(".") for folder in name.split("/"))


def impossible(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with well-typed `values` (by dotted key), a sentence or two each; [] where they can be."""
    problems = [
        f"{key}={values[key]} is below the least possible value, {least}."
        for key, least in _LEAST.items()
        if values.get(key) is not None and values[key] < least
    ]
    problems += [
        f"{key}={values[key]:g} is not above 0; null switches it off."
        for key in _ABOVE_ZERO
        if values.get(key) is not None and not 0 < values[key] < float("inf")
    ]
    name, stage, kind = values.get("name", "run"), values.get("engine.stage", 0), values.get("engine.kind")
    if not is_run_name(name):
        problems.append(
            f"name={name!r} must be a folder name (or a/b) of letters, digits and any of . _ - , = + @ without '..'."
        )
    if stage > 3 or (kind == "plain" and stage > 0):
        problems.append(
            f"engine.stage={stage} does not go with engine.kind={kind}; choose engine=plain, zero1, zero2 or zero3."
        )
    problems += _of_memory(values, stage) + _of_privacy(values) + _of_average(values)
    if values.get("schedule.unit") == "tokens" and values.get("stop.tokens") is None:
        problems.append("schedule.unit=tokens needs the number of tokens at the run's end; set stop.tokens.")
    if values.get("stop.patience") is not None and values.get("eval.every") == 0:
        problems.append(
            f"stop.patience={values['stop.patience']} counts evaluations, and eval.every=0 makes none; set eval.every."
        )
    return problems


def _of_privacy(values: Mapping[str, Any]) -> list[str]:
    """Of private training, which needs the gradient of every sample for itself."""
    noise, samples = values.get("privacy.noise_multiplier"), values.get("privacy.num_samples")
    if noise is None:
        return []
    problems = []
    if samples is None or samples < 1:
        problems.append("privacy.num_samples has no value; set it to the number of samples of the train split.")
    elif not 0 < values["privacy.delta"] < 1 / samples:
        problems.append(
            f"privacy.delta={values['privacy.delta']:g} is not below 1 / privacy.num_samples: it would allow to give a"
            f" sample away; use {0.1 / samples:.0e} or less."
        )
    if values.get("engine.kind") == "zero":
        problems.append(
            "privacy.noise_multiplier: ZeRO sums the gradients of samples while they are made, before each could be"
            " clipped; use engine=plain."
        )
    for key in ("engine.sequence_parallel", "engine.tensor_parallel"):
        if values.get(key, 1) > 1:
            problems.append(
                f"privacy.noise_multiplier: with {key}={values[key]} no rank has a sample's gradient; set 1."
            )
    if values.get("data.batching") == "packed":
        problems.append(
            "privacy.noise_multiplier: data.batching=packed puts several samples into a row, which cannot be clipped"
            " one by one; use data.batching=bucketed."
        )
    return problems


def _of_average(values: Mapping[str, Any]) -> list[str]:
    """Of the moving average of the weights."""
    decay, problems = values.get("ema.decay"), []
    if decay is not None and not 0 < decay < 1:
        problems.append(f"ema.decay={decay:g} is not between 0 and 1; use a number such as 0.999, or null for none.")
    if decay is not None and values.get("engine.offload_optimizer") == "nvme":
        problems.append(
            f"ema.decay={decay:g} does not go with engine.offload_optimizer=nvme: every update of the average would"
            " read the masters from the disk again; use engine.offload_optimizer=cpu, or ema.decay=null."
        )
    if values.get("ema.evaluate") and decay is None:
        problems.append("ema.evaluate=true needs an average to evaluate; set ema.decay, such as 0.999.")
    return problems


def _of_memory(values: Mapping[str, Any], stage: int) -> list[str]:
    """Of the keys that trade memory for time."""
    problems = []
    for states, least in (("optimizer", 1), ("parameters", 3)):
        where = values.get(f"engine.offload_{states}", "none")
        least = 3 if where == "nvme" else least
        if where != "none" and stage < least:
            problems.append(
                f"engine.offload_{states}={where} needs ZeRO stage {least} or higher, and engine.stage={stage};"
                f" choose engine=zero3_offload, or engine.offload_{states}=none."
            )
    problems += [
        f"{key}=nvme needs a folder to keep them in; set engine.nvme_path to one on a fast local disk."
        for key in ("engine.offload_optimizer", "engine.offload_parameters")
        if values.get(key) == "nvme" and values.get("engine.nvme_path") is None
    ]
    if values.get("engine.compile") and stage == 3:
        problems.append(
            "engine.compile=true does not go with engine.stage=3, which gathers the parameters of each module from"
            " Python just before it runs: every module would be a graph of its own, and a stale one where a parameter"
            " is not there; use engine=zero2 or engine=zero1, or engine.compile=false."
        )
    for key in ("engine.sequence_parallel", "engine.tensor_parallel"):
        if values.get("engine.compile") and values.get(key, 1) > 1:
            problems.append(
                f"{key}={values[key]} does not go with engine.compile=true: its collectives are not compiled;"
                f" set {key}=1 or engine.compile=false."
            )
    for key in ("engine.recompute", "engine.offload_activations"):
        if values.get("engine.compile") and values.get(key, "none") != "none":
            problems.append(
                f"{key}={values[key]} does not go with engine.compile=true, which decides for itself what to recompute;"
                f" set {key}=none or engine.compile=false."
            )
    return problems
