"""The moving average of the weights: what it is, that it is evaluated and saved, and that training does not see it."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import ROOT, launch_command, run_command
from tests.engine.test_plain import make_batch, make_engine, train_step, weights
from tests.warm import run_warm
from trainer.checkpoint.average import WeightReader, find_all
from trainer.checkpoint.load import load, newest
from trainer.checkpoint.save import Checkpointer
from trainer.composition import compose
from trainer.config import CheckpointConfig, to_config
from trainer.engine.average import AveragingEngine
from trainer.errors import CheckpointError, ConfigError
from trainer.state import TrainState


def averaging(dtype=torch.float32, evaluates=True):
    return AveragingEngine(make_engine(dtype), 0.75, evaluates)


def averages(engine):
    return {f.parameter: f.tensor.clone() for f in engine.fragments() if f.key == "ema"}


def save(root, engine, *steps):
    root.mkdir(exist_ok=True)
    checkpointer = Checkpointer(root, engine, {}, CheckpointConfig(keep=9), lambda *_: None)
    for step in steps:
        checkpointer.save(TrainState(step=step), {})
        checkpointer.require()
        train_step(engine, make_batch(seed=step))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_mean_of_all_weights_so_far_with_falling_shares(dtype):
    engine, twin = averaging(dtype), make_engine(dtype)
    expected = averages(engine)
    for seed in range(4):
        train_step(engine, make_batch(seed=seed))
        train_step(twin, make_batch(seed=seed))
        for name, value in weights(twin).items():
            expected[name] = 0.75 * expected[name] + 0.25 * value
    for name, value in averages(engine).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name])
        assert torch.equal(weights(engine)[name], weights(twin)[name]), "training does not see the average"


def test_a_step_without_an_update_leaves_it():
    engine = averaging()
    train_step(engine, make_batch())
    before = averages(engine)
    engine.step(1e-2, max_norm=-1.0)
    assert all(torch.equal(value, before[name]) for name, value in averages(engine).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_sees_the_average_and_training_goes_on_as_before(dtype):
    engine = averaging(dtype)
    for seed in range(3):
        train_step(engine, make_batch(seed=seed))
    kept, average = weights(engine), averages(engine)
    with engine.evaluating():
        for name, parameter in engine.module.named_parameters():
            assert torch.equal(parameter.detach().flatten(), average[name].to(dtype))
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter.detach().flatten(), kept[name].to(dtype))
        assert torch.equal(weights(engine)[name], kept[name]) and torch.equal(averages(engine)[name], average[name])
    with averaging(dtype, evaluates=False).evaluating():
        pass


def test_a_checkpoint_brings_it_back_to_the_last_bit(tmp_path):
    engine, heir = averaging(), averaging()
    save(tmp_path, engine, 1, 2, 3)
    load(newest(tmp_path), heir)
    train_step(heir, make_batch(seed=3))
    for name, value in averages(engine).items():
        assert torch.equal(averages(heir)[name], value)


def test_weights_to_use_are_those_of_a_checkpoint_its_average_or_the_mean_of_several(tmp_path):
    engine, found = averaging(), {}
    for step in (1, 2, 3):
        found[step] = weights(engine), averages(engine)
        save(tmp_path, engine, step)
    for weights_of, place in (("master", 0), ("ema", 1)):
        with WeightReader(find_all(tmp_path, "latest"), weights_of) as reader:
            read = dict(reader.whole())
        assert all(torch.equal(value.flatten(), found[3][place][name]) for name, value in read.items())
        with WeightReader(find_all(tmp_path, "average:2"), weights_of) as reader:
            read = dict(reader.whole())
        for name, value in found[3][place].items():
            torch.testing.assert_close(read[name].flatten(), (value + found[2][place][name]) / 2)


def test_what_cannot_be_averaged(tmp_path):
    save(tmp_path, make_engine(), 1)
    with pytest.raises(CheckpointError, match=r"average:5 wants 5 checkpoints, and .* has 1; .*checkpoint.keep=5"):
        find_all(tmp_path, "average:5")
    with pytest.raises(ConfigError, match="checkpoint=average:one"):
        find_all(tmp_path, "average:one")
    with pytest.raises(ConfigError, match="weights=mean"):
        WeightReader(find_all(tmp_path, "latest"), "mean")
    with pytest.raises(CheckpointError, match=r"no ema of any parameter.*weights=master"):
        WeightReader(find_all(tmp_path, "latest"), "ema").__enter__()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ema.decay=1"], r"ema.decay=1 is not between 0 and 1"),
        (["ema.evaluate=true"], r"ema.evaluate=true needs an average"),
        (["ema.decay=0.9", "engine=zero3_nvme", "engine.nvme_path=/tmp"], r"ema.decay=0.9 does not go with .*nvme"),
        (["engine.compile=true", "engine=zero3"], r"engine.compile=true does not go with engine.stage=3"),
    ],
)
def test_settings_that_cannot_be(words, message):
    words = [words[1], words[0], *words[2:]] if words[-1] == "engine=zero3" else words
    with pytest.raises(ConfigError, match=message):
        to_config(compose(["experiment=quickstart", *words]))


@pytest.mark.dist
def test_sharded_engines_hold_the_same(trainer_env):
    """Two ranks; see `average_on_ranks.py`: losses by the fused head, masters and averages, with Lion."""
    cases = ["zero1,lion", "zero2,lion", "zero3,lion"]
    done = run_warm("tests.engine.average_on_ranks", cases, 2, ROOT, trainer_env, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [line.partition(" ")[0] for line in done.stdout.splitlines() if "is the same" in line] == cases


@pytest.mark.dist
@pytest.mark.slow
def test_a_compiled_model_learns_the_same(trainer_env):
    """One rank, for the compiler takes its time; it fuses what it likes, so to 1e-5."""
    cases = ["zero2,adamw,engine.compile=true"]
    command = [*launch_command("python", 1, "tests.engine.average_on_ranks"), *cases]
    done = run_command(command, ROOT, trainer_env, 300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [line.partition(" ")[0] for line in done.stdout.splitlines() if "is the same" in line] == cases
