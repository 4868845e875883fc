"""Sweeps: which runs, what becomes of them, and what is told about them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from launch.__main__ import main
from launch.sweeps.results import Row, Table
from launch.sweeps.run import run_sweep
from tests.launch.sweeps.conftest import Trained
from trainer.errors import ConfigError

WORDS = ["-m", "experiment=digits_mlp", "steps=3"]


def sweep(trained: Trained, *words: str, method: str = "grid", trials: int = 0) -> int:
    return run_sweep(trained, [*WORDS, *words], method, trials)


def table(trained: Trained) -> list[dict[str, str]]:
    (path,) = trained.runs_dir.glob("sweeps/*/sweep.csv")
    return list(csv.DictReader(path.read_text().splitlines()))


def test_every_combination_runs_in_a_directory_of_its_own_and_the_best_comes_first(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(trained, "optimizer.lr=0.1,0.3", "seed=0,1") == 0
    assert sorted(trained.started) == [
        f"digits_mlp-optimizer.lr={lr},seed={seed},steps=3" for lr in ("0.1", "0.3") for seed in (0, 1)
    ]
    rows = table(trained)
    assert [(row["optimizer.lr"], row["seed"]) for row in rows] == [
        ("0.3", "0"),
        ("0.3", "1"),
        ("0.1", "0"),
        ("0.1", "1"),
    ]
    assert {row["metric"] for row in rows} == {"eval/accuracy"}
    assert float(rows[0]["value"]) == pytest.approx(0.95)  # the best evaluation, not the last
    assert (rows[0]["final_split"], rows[0]["final"], rows[0]["state"]) == ("test", "0.5", "finished")
    (folder,) = trained.runs_dir.glob("sweeps/*")
    assert (folder / "sweep.md").read_text() in capsys.readouterr().out
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    written = [yaml.safe_load(path.read_text()) for path in trained.runs_dir.glob("digits_mlp-*/config.yaml")]
    assert {config["logging"]["wandb"]["group"] for config in written} == {folder.name}, "one group in W&B"


def test_a_failed_run_does_not_lose_the_others_and_the_exit_code_counts(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    trained.outcomes = {"lr=0.1": 1, "lr=0.2": RuntimeError("our own fault")}
    assert sweep(trained, "optimizer.lr=0.1,0.2,0.3", "seed=0,bad") == 100 + 5
    states = {(row["optimizer.lr"], row["seed"]): row["state"] for row in table(trained)}
    assert states == {
        ("0.1", "0"): "failed",
        ("0.2", "0"): "failed",
        ("0.3", "0"): "finished",
        **{(lr, "bad"): "refused" for lr in ("0.1", "0.2", "0.3")},
    }
    error = capsys.readouterr().err
    assert "our own fault" in error and error.count("error: seed='bad' is not a whole number.") == 3


def test_the_same_sweep_again_runs_what_is_missing_and_more_steps_go_on(trained: Trained) -> None:
    trained.outcomes = {"lr=0.3": 1}
    assert sweep(trained, "optimizer.lr=0.1,0.3") == 101
    trained.outcomes, trained.started = {}, []
    assert sweep(trained, "optimizer.lr=0.1,0.3") == 0
    assert trained.started == ["digits_mlp-optimizer.lr=0.3,steps=3"]
    trained.started = []
    words = ["-m", "experiment=digits_mlp", "name=a,b", "seed=1"]
    assert run_sweep(trained, [*words, "steps=3"], "grid", 0) == 0
    assert run_sweep(trained, [*words, "steps=4"], "grid", 0) == 0
    assert trained.started == ["a", "b", "a", "b"]


def test_a_finished_run_of_another_configuration_is_refused(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sweep(trained, [*WORDS, "name=a,b"], "grid", 0)
    assert run_sweep(trained, [*WORDS, "name=a,b", "optimizer.lr=0.7"], "grid", 0) == 102
    assert "was written by another configuration" in capsys.readouterr().err


def test_a_sweep_that_is_told_to_stop_starts_no_other_run(trained: Trained) -> None:
    trained.outcomes = {"lr=0.2": 75}
    assert sweep(trained, "optimizer.lr=0.1,0.2,0.3") == 75
    assert len(trained.started) == 2
    assert {row["optimizer.lr"]: row["state"] for row in table(trained)} == {
        "0.1": "finished",
        "0.2": "preempted",
        "0.3": "not started",
    }


def test_what_no_run_could_be_made_of_is_refused_before_any(trained: Trained) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lrr is no key of the configuration; did you mean optimizer\.lr"):
        sweep(trained, "optimizer.lrr=1,2")
    with pytest.raises(ConfigError, match="name has no value"):
        run_sweep(trained, ["-m", "seed=0,1"], "grid", 0)
    with pytest.raises(ConfigError, match="sweep=guess is neither grid nor optuna"):
        sweep(trained, "seed=0,1", method="guess")
    assert trained.started == []


def test_a_table_without_values_or_with_several_metrics_can_be_written(tmp_path: Path) -> None:
    loss = Row("a", {"task": "x"}, "finished", 1, "eval/loss", False, 0.5)
    accuracy = Row("b", {"task": "y"}, "finished", 1, "eval/accuracy", True, 0.5, 0.6, "test")
    text = Table([loss, accuracy, Row("c|d", {}, "refused")]).markdown()
    assert "eval/loss 0.5" in text and "eval/accuracy 0.6 (test)" in text and "c\\|d" in text
    assert not Table([Row("a", {"seed": "0"}, "failed")]).draw(tmp_path / "a.png")


@pytest.mark.dist
def test_a_real_sweep_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run on two ranks, one that is refused for a number that cannot be."""
    monkeypatch.chdir(tmp_path)
    words = [*WORDS, "logging=[]", "eval.max_samples=32", "eval.final_split=validation", "batch.global_size=32,33"]
    assert main(["launcher.ranks=2", *words]) == 101
    states = {row["batch.global_size"]: row["state"] for row in table(Trained(tmp_path / "runs"))}
    assert states == {"32": "finished", "33": "refused"}
    (run,) = (tmp_path / "runs").glob("digits_mlp-*32*")
    assert json.loads((run / "plan.json").read_text())["world_size"] == 2
    assert "batch.global_size=33" in capsys.readouterr().err
