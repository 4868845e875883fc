"""The chooser: what it chooses is the fastest of what fits, and the trainer takes it."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import pytest

from launch.planner.found import arrangement
from launch.planner.search import choose, smallest_that_fits
from trainer.build import build, part_problems
from trainer.composition import compose
from trainer.config import config_to_dict, to_config
from trainer.errors import ConfigError
from trainer.estimate import layout_of, load_cluster, predict, shape_of
from trainer.parallel.split import check_split
from trainer.plan import make_plan


def configured(*words):
    return to_config(compose(words), part_problems)


SEVEN = ("experiment=decoder_7b_zero3", "batch.global_size=256")


@pytest.mark.parametrize(
    ("words", "cluster"),
    [
        (SEVEN, "a100_40gb_2x8"),
        (("experiment=encoder_decoder_3b_zero3_offload",), "v100_16gb_1x8"),
        (("experiment=bert_masked_lm", "data.workers=2"), "h100_1x8"),
        (("experiment=digits_mlp", "batch.micro_size=null"), "a100_80gb_1x4"),
    ],
)
def test_what_is_chosen_is_what_the_trainer_takes(words, cluster):
    """Rules of the configuration, of the batch, of splitting and of lanes; nothing but the settings has changed."""
    config, machines = configured(*words), load_cluster(cluster)
    found = choose(config, machines)
    split = [one for one in found.runners_up if "tensor" in one.arrangement or "sequence" in one.arrangement]
    for one in (found.best, *split[:1]):
        chosen = to_config(config_to_dict(one.config), part_problems)
        plan = make_plan(chosen, machines.ranks)
        check_split(partial(build, chosen.model, "model"), plan)
        assert plan.global_size == config.batch.global_size
        assert chosen.data["lanes"] % (plan.data_parallel * max(1, chosen.data["workers"])) == 0
        same = replace(chosen, batch=config.batch, engine=config.engine, data=config.data)
        assert config_to_dict(same) == config_to_dict(config)
        assert predict(shape_of(chosen), layout_of(chosen, machines.ranks), machines).surely_fits or found.narrowly


def test_the_fastest_that_fits_is_chosen_and_whatever_is_faster_does_not_fit():
    config, cluster = configured(*SEVEN), load_cluster("a100_40gb_2x8")
    found = choose(config, cluster)
    seconds = [one.seconds for one in found.runners_up]
    assert seconds == sorted(seconds) and found.best.seconds <= 1.01 * min(seconds)
    names = [one.arrangement for one in (found.best, *found.runners_up)]
    assert len(set(names)) == len(names)
    with_everything = replace(cluster, memory_gib=1e4, host_memory_gib=1e6)
    assert choose(config, with_everything).best.seconds < found.best.seconds
    assert all(failure.excess > 1 for failure in found.failures)
    assert not {arrangement(failure.engine) for failure in found.failures} & set(names)
    plain = next(failure for failure in found.failures if failure.family == "plain")
    assert "GiB device memory (optimizer states" in plain.reason


def test_seventy_billion_on_a_thousand_devices_takes_seconds():
    config, cluster = configured("experiment=decoder_70b_zero3"), load_cluster("h100_128x8")
    began = time.perf_counter()
    found = choose(config, cluster)
    assert time.perf_counter() - began < 5
    assert found.tried > 500 and found.best.prediction.ranks == 1024


def test_what_does_not_go_with_the_task_or_the_optimizer_is_not_chosen():
    """The loss of preferences is no sum over positions; Muon wants whole matrices."""
    found = choose(configured("experiment=dpo_small"), load_cluster("h100_1x4"))
    assert all(one.config.engine.sequence_parallel == 1 for one in (found.best, *found.runners_up))
    assert any("no sum over positions" in failure.reason for failure in found.failures)
    found = choose(configured("experiment=lm_small", "optimizer=muon"), load_cluster("h100_1x4"))
    assert {str(one.config.engine.kind) for one in (found.best, *found.runners_up)} == {"plain"}
    assert all(one.config.engine.tensor_parallel == 1 for one in (found.best, *found.runners_up))


def test_a_cluster_that_is_too_small_is_told_the_smallest_that_fits():
    config, cluster = configured("experiment=decoder_70b_zero3"), load_cluster("v100_16gb_1x8")
    with pytest.raises(ConfigError, match=r"smallest number of such nodes that fits is") as caught:
        choose(config, cluster)
    nodes = smallest_that_fits(config, cluster)
    assert nodes > 1 and f"cluster=v100_16gb_{nodes}x8" in str(caught.value)
    assert choose(config, replace(cluster, nodes=nodes)).best.prediction.fits
    for fewer in range(1, nodes):
        with pytest.raises(ConfigError, match=r"too small|does not divide"):
            choose(config, replace(cluster, nodes=fewer))


def test_a_batch_that_does_not_divide_is_refused_as_the_trainer_does():
    with pytest.raises(ConfigError, match=r"batch.global_size=1024 does not divide over 24 ranks"):
        choose(configured("experiment=decoder_7b_zero3"), load_cluster("h100_3x8"))
