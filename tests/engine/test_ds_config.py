"""The JSON for DeepSpeed follows from the plan alone."""

from __future__ import annotations

import json

import pytest

from trainer.engine.ds_config import make_ds_config
from trainer.plan import RunPlan


def make(**changes):
    facts = {
        "world_size": 2,
        "global_size": 32,
        "rank_size": 16,
        "micro_size": 4,
        "accumulation": 4,
        "micro_tokens": None,
        "precision": "bf16",
        "engine": "zero",
        "zero_stage": 2,
        "offload_optimizer": "none",
        "offload_parameters": "none",
        "nvme_path": None,
        "clip_norm": 1.0,
    }
    return make_ds_config(RunPlan(**{**facts, **changes}))


def test_plain_engine_has_none():
    assert make(engine="plain", zero_stage=0) == {}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_batch_numbers_come_from_the_plan_and_nothing_is_said_twice(stage):
    settings = make(zero_stage=stage)
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 4
    assert "train_batch_size" not in settings
    assert "optimizer" not in settings and "scheduler" not in settings
    json.dumps(settings)


def test_precision():
    assert make()["bf16"] == {"enabled": True}
    assert make()["data_types"] == {"grad_accum_dtype": "fp32"}
    fp16 = make(precision="fp16")["fp16"]
    assert fp16["enabled"] and fp16["loss_scale"] == 0  # 0: dynamic
    assert not {"bf16", "fp16"} & set(make(precision="fp32"))


def test_offload_and_clipping():
    zero = make(zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu")["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"
    zero = make(zero_stage=3, offload_parameters="nvme", nvme_path="/disk/run")["zero_optimization"]
    assert zero["offload_param"] == {"device": "nvme", "pin_memory": False, "nvme_path": "/disk/run", "max_in_cpu": 0}
    assert make(clip_norm=0.5)["gradient_clipping"] == 0.5
    assert make(clip_norm=None)["gradient_clipping"] == 0.0


def test_token_budgets_leave_the_accumulation_open():
    settings = make(micro_size=None, accumulation=None, micro_tokens=4096)
    assert settings["gradient_accumulation_steps"] > 1
