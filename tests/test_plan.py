"""The batch arithmetic."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import BatchConfig, Config, EngineConfig, EngineKind, Offload
from trainer.errors import ConfigError
from trainer.plan import make_plan, nearest_multiples


def config_of(**batch: Any) -> Config:
    return Config(name="plan", steps=1, batch=BatchConfig(**batch))


def suggestions(message: str) -> list[dict[str, int]]:
    """Every change that the message's last sentence offers."""
    offered = message.partition("; use ")[2]
    found = re.findall(r"batch\.(\w+)=(\d+)(?: or (\d+))?", offered)
    return [{key: int(value)} for key, *values in found for value in values if value]


@given(
    global_size=st.integers(1, 5000),
    micro_size=st.none() | st.integers(1, 5000),
    world_size=st.integers(1, 300),
)
def test_the_split_is_exact_or_refused_with_sizes_that_work(
    global_size: int, micro_size: int | None, world_size: int
) -> None:
    batch = BatchConfig(global_size=global_size, micro_size=micro_size)
    try:
        plan = make_plan(config_of(global_size=global_size, micro_size=micro_size), world_size)
    except ConfigError as error:
        offered = suggestions(str(error))
        assert offered
        for change in offered:
            make_plan(Config(name="plan", steps=1, batch=replace(batch, **change)), world_size)
    else:
        assert plan.micro_size is not None and plan.accumulation is not None
        assert plan.micro_size * plan.accumulation * world_size == global_size == plan.rank_size * world_size
        assert plan.micro_size == (micro_size or plan.rank_size)


@given(global_size=st.integers(1, 5000), micro_tokens=st.integers(1, 5000), world_size=st.integers(1, 300))
def test_a_token_budget_leaves_the_number_of_micro_batches_open(
    global_size: int, micro_tokens: int, world_size: int
) -> None:
    config = config_of(global_size=global_size, micro_tokens=micro_tokens)
    if global_size % world_size:
        with pytest.raises(ConfigError, match="does not divide"):
            make_plan(config, world_size)
    else:
        plan = make_plan(config, world_size)
        assert (plan.rank_size * world_size, plan.micro_tokens) == (global_size, micro_tokens)
        assert (plan.micro_size, plan.accumulation) == (None, None)


def test_a_refusal_names_every_number_and_the_nearest_that_fit() -> None:
    with pytest.raises(ConfigError, match=r"batch.global_size=100 does not divide over 8 ranks; .*=96 or 104\."):
        make_plan(config_of(global_size=100), 8)
    with pytest.raises(
        ConfigError, match=r"micro_size=5 does not divide the 12 samples.*micro_size=4 or 6, or .*=80 or"
    ):
        make_plan(config_of(global_size=96, micro_size=5), 8)
    with pytest.raises(ConfigError, match=r"micro_size=4 and batch.micro_tokens=100 are both set"):
        make_plan(config_of(global_size=8, micro_size=4, micro_tokens=100), 2)


def test_fewer_samples_than_ranks_offers_only_what_is_possible() -> None:
    with pytest.raises(ConfigError, match=r"use batch.global_size=8\.$"):
        make_plan(config_of(global_size=3), 8)
    assert nearest_multiples(3, 8) == [8]
    assert nearest_multiples(17, 8) == [16, 24]


def test_the_plan_repeats_engine_and_precision_in_plain_values() -> None:
    engine = EngineConfig(kind=EngineKind.zero, stage=3, offload_optimizer=Offload.cpu, offload_parameters=Offload.cpu)
    plan = make_plan(Config(name="plan", steps=1, batch=BatchConfig(global_size=4), engine=engine, clip_norm=None), 2)
    assert plan.to_dict() == {
        "world_size": 2,
        "global_size": 4,
        "rank_size": 2,
        "micro_size": 2,
        "accumulation": 1,
        "micro_tokens": None,
        "precision": "bf16",
        "engine": "zero",
        "zero_stage": 3,
        "offload_optimizer": "cpu",
        "offload_parameters": "cpu",
        "clip_norm": None,
        "nvme_path": None,
        "sequence_parallel": 1,
        "tensor_parallel": 1,
        "data_parallel": 2,
    }


def test_ranks_that_share_matrices_or_sequences_share_samples() -> None:
    engine = EngineConfig(sequence_parallel=2, tensor_parallel=2)
    config = Config(name="plan", steps=1, batch=BatchConfig(global_size=12), engine=engine)
    assert make_plan(config, 8).rank_size == 6
    with pytest.raises(ConfigError, match=r"batch.global_size=12 does not divide over 5 groups of ranks.*=10 or 15"):
        make_plan(config, 20)
    with pytest.raises(
        ConfigError, match=r"sequence_parallel=2 x engine.tensor_parallel=2 does not divide the 6 ranks"
    ):
        make_plan(config, 6)
