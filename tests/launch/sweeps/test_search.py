"""Searches: Optuna's choice of values, and the description of a sweep that W&B steers."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path

import pytest
import yaml

from launch.__main__ import main as launch
from launch.sweeps.run import run_sweep
from launch.sweeps.wandb import main
from tests.conftest import find_free_port
from tests.launch.sweeps.conftest import Trained
from trainer.composition import Axis, axes
from trainer.errors import ConfigError

SAME = ["-m", "experiment=digits_mlp", "steps=3"]
RATE = "optimizer.lr=interval(0.0,1.0)"


def rows(trained: Trained) -> list[dict[str, str]]:
    (path,) = trained.runs_dir.glob("sweeps/*/sweep.csv")
    return list(csv.DictReader(path.read_text().splitlines()))


def test_words_are_told_from_keys_that_are_swept() -> None:
    words = [
        "-m",
        "seed=0,1",
        "steps=3",
        "optimizer.lr=tag(log,interval(1e-4,1))",
        "a=int(interval(1,8))",
        "b=range(1,4)",
    ]
    assert axes(words) == (
        ["-m", "steps=3"],
        [
            Axis("seed", ("0", "1")),
            Axis("optimizer.lr", (), 1e-4, 1.0, log=True),
            Axis("a", (), 1, 8, whole=True),
            Axis("b", ("1", "2", "3")),
        ],
    )


def test_optuna_begins_with_the_experiment_and_finds_better(trained: Trained) -> None:
    pytest.importorskip("optuna")
    trained.accuracy = lambda lr: 1.0 - abs(lr - 0.6)
    assert run_sweep(trained, [*SAME, RATE, "seed=0,1"], "optuna", 6) == 0
    assert trained.started[0] == "digits_mlp-steps=3" and len(set(trained.started)) == 6
    found = rows(trained)
    baseline = next(row for row in found if row["run"] == "digits_mlp-steps=3")
    assert (baseline["optimizer.lr"], baseline["seed"]) == ("0.3", "0")
    assert float(found[0]["value"]) > float(baseline["value"])
    assert all(0 <= float(row["optimizer.lr"]) <= 1 for row in found)


def test_a_search_goes_on_where_it_was_stopped(trained: Trained) -> None:
    pytest.importorskip("optuna")
    trained.accuracy = lambda lr: 0.5
    assert run_sweep(trained, [*SAME, RATE], "optuna", 2) == 0
    trained.outcomes = {"lr=": 75}
    assert run_sweep(trained, [*SAME, RATE], "optuna", 4) == 75
    (stopped,) = (row["run"] for row in rows(trained) if row["state"] == "preempted")
    trained.outcomes, trained.started = {}, []
    assert run_sweep(trained, [*SAME, RATE], "optuna", 4) == 0
    assert trained.started[0] == stopped and len(trained.started) == 2  # the rest is finished
    assert len({row["optimizer.lr"] for row in rows(trained)}) == 4


def test_a_search_whose_experiment_fails_is_given_up(trained: Trained) -> None:
    pytest.importorskip("optuna")
    trained.outcomes = {"digits_mlp": 1}
    assert run_sweep(trained, [*SAME, RATE], "optuna", 5) == 101
    assert len(trained.started) == 1


def test_failed_trials_are_counted_and_the_search_goes_on(trained: Trained) -> None:
    pytest.importorskip("optuna")
    trained.outcomes = {"lr=": 1}
    assert run_sweep(trained, [*SAME, RATE], "optuna", 3) == 102
    assert [row["state"] for row in rows(trained)] == ["finished", "failed", "failed"]


@pytest.mark.parametrize(
    ("words", "trials", "expected"),
    [
        (["seed=1"], 5, "There is no key to search"),
        (["optimizer.lr=tag(log,interval(0,1))"], 5, "optimizer.lr: an interval on a logarithmic scale begins above 0"),
        (["optimizer.lr=interval(1,0)"], 5, "from the lower to the higher number, not from 1 to 0"),
        (["optimizer.lrr=interval(0,1)"], 5, "optimizer.lrr is no key of the configuration; did you mean optimizer.lr"),
        ([RATE], 1, "trials=1 leaves nothing to search"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_before_any_run(
    words: list[str], trials: int, expected: str, trained: Trained
) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(ConfigError) as raised:
        run_sweep(trained, [*SAME, *words], "optuna", trials)
    assert expected in str(raised.value)
    assert trained.started == []


def test_a_sweep_of_wandb_says_what_to_search_and_what_to_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment=quickstart", "optimizer.lr=tag(log,interval(1e-4,1e-2))", "model.d_ff=256,512"]
    assert main([*words, "schedule=cosine,linear", "schedule.warmup=int(interval(1,9))", "launcher.ranks=2"]) == 0
    described = yaml.safe_load(capsys.readouterr().out)
    assert described["parameters"] == {
        "optimizer.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        "model.d_ff": {"values": [256, 512]},
        "schedule": {"values": ["cosine", "linear"]},
        "schedule.warmup": {"distribution": "int_uniform", "min": 1, "max": 9},
    }
    assert (described["project"], described["method"]) == ("shardwright", "bayes")
    assert described["metric"] == {"name": "eval/loss", "goal": "minimize"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["method=guess"], "method=guess is not one of bayes, random, grid"),
        (["method=grid"], "optimizer.lr: method=grid needs values, not an interval"),
        (["logging=[console]"], "logging has no wandb"),
        (["goal=max", "runs=x"], "runs=x must be a whole number or null"),
    ],
)
def test_a_sweep_that_no_agent_could_run_is_refused(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experiment=quickstart", "optimizer.lr=interval(0,1)", *words]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.dist
def test_the_agent_of_wandb_runs_a_run_of_its_own_with_the_values_it_was_given(
    tmp_path: Path, trainer_env: dict[str, str]
) -> None:
    """What `wandb agent` does with the description, by its own functions, without its server."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    path = tmp_path / "sweep.yaml"
    words = ["experiment=digits_mlp", "steps=3", "logging=[wandb]", "eval.max_samples=32", f"runs_dir={tmp_path}/runs"]
    assert main([*words, "optimizer.lr=interval(0,1)", "model.hidden_sizes=[8],[16]", f"to={path}"]) == 0
    described = yaml.safe_load(path.read_text())
    given = {"optimizer.lr": {"value": 0.125}, "model.hidden_sizes": {"value": "[8]"}}
    known = {
        **create_sweep_command_args({"args": given}),
        "env": ["/usr/bin/env"],
        "program": [described["program"]],
    }
    command = []
    for word in create_sweep_command(described["command"]):
        command += known[word[2:-1]] if word.startswith("${") else [word]
    env = {**trainer_env, "WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "r1", "MASTER_PORT": str(find_free_port())}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "runs").glob("digits_mlp-*")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["optimizer"]["lr"], config["model"]["hidden_sizes"]) == (0.125, [8])
    assert (run / "wandb" / "run_id").read_text().strip() == "r1"  # else the agent would wait for another run
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_a_search_without_a_sweep_or_before_it_runs_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["sweep=optuna", "experiment=digits_mlp", RATE]) == 2
    assert "add -m" in capsys.readouterr().err
    assert launch(["sweep=optuna", "dry_run=true", *SAME, RATE]) == 2
    assert "leave dry_run out" in capsys.readouterr().err
