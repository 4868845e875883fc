"""RunPlan -> DeepSpeed's JSON. Pure, and the only file that spells DeepSpeed's keys.

The JSON is output: it is written to the run directory and handed to DeepSpeed, never read from a user.
`train_batch_size` is not in it: DeepSpeed would assert its own product of numbers that we derive once, in the plan.
"""

from __future__ import annotations

from typing import Any

from trainer.plan import RunPlan

_SWAPPED_ELEMENTS = 5 * 10**7
"""Of masters and each optimizer state, that are in memory at once when they live on a disk."""

_SWAP_BUFFERS = 5
"""Of page-locked memory, each for so many fp32 numbers: masters, gradients and at most three states of an optimizer."""

LARGEST_BUCKET, SMALLEST_BUCKET = 5 * 10**8, 1 << 20
"""Elements of the buffer in which gradients are collected to be sent: DeepSpeed's own number, and one below which a
collective is all latency."""


def bucket_elements(parameters: float) -> float:
    """Of a model with so many trained parameters on a rank: an eighth of them. The buffer and the copy that DeepSpeed
    sends stay small beside the gradients, whatever the size of the model."""
    return min(LARGEST_BUCKET, max(SMALLEST_BUCKET, parameters // 8))


def with_buckets(settings: dict[str, Any], parameters: int) -> dict[str, Any]:
    """`settings` with buckets for a model of so many trained parameters."""
    zero = {**settings["zero_optimization"], "reduce_bucket_size": bucket_elements(parameters)}
    return {**settings, "zero_optimization": zero}


def make_ds_config(plan: RunPlan) -> dict[str, Any]:
    """The dictionary given to `deepspeed.initialize` for this plan; {} when the engine is not ZeRO."""
    if plan.engine != "zero":
        return {}
    zero: dict[str, Any] = {
        "stage": plan.zero_stage,
        "overlap_comm": False,  # for GPUs too, until it has been measured on one
        "contiguous_gradients": True,
    }
    if plan.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": plan.offload_optimizer, "pin_memory": False}
    if plan.offload_optimizer == "nvme":
        zero["offload_optimizer"] |= {"nvme_path": plan.nvme_path, "buffer_count": _SWAP_BUFFERS}
    if plan.offload_parameters != "none":
        zero["offload_param"] = {"device": plan.offload_parameters, "pin_memory": False}
    if plan.offload_parameters == "nvme":  # its buffers depend on the model: `trainer.engine.zero` adds them
        zero["offload_param"] |= {"nvme_path": plan.nvme_path, "max_in_cpu": 0}
        # What is kept gathered, or read ahead for a backward pass that does not come (evaluation), keeps its buffer.
        zero |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    if "nvme" in (plan.offload_optimizer, plan.offload_parameters):
        zero["sub_group_size"] = _SWAPPED_ELEMENTS
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.micro_size or 1,
        # With a token budget the number of micro-batches varies; any number above 1 makes offload accumulate.
        "gradient_accumulation_steps": plan.accumulation or 2,
        "gradient_clipping": plan.clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }
    if plan.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    elif plan.precision == "fp16":
        settings["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    return settings
