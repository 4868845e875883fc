"""`python -m launch.planner`, as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from launch.planner.__main__ import main
from tests.conftest import ROOT
from trainer.config import config_from_yaml

SEVEN = ["experiment=decoder_7b_zero3", "cluster=h100_8x8"]


def test_every_term_is_shown_with_its_formula_and_the_totals_with_error_bars(capsys):
    assert main([*SEVEN, "tokens=2e12", "price=2.5"]) == 0
    shown = capsys.readouterr().out
    for words in ("6,738,415,616 parameters", "optimizer states", "gathered parameters", "products of matrices"):
        assert words in shown
    assert "parameters of the rank x bytes / ranks that share them" in shown
    assert "2e+12 tokens" in shown and "at 2.5 a device and hour" in shown
    assert "fits" in shown and " to " in shown


def test_json_adds_up(capsys):
    assert main([*SEVEN, "--json", "tokens=1e12", "price=2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(term["value"] for term in found["memory"]) == pytest.approx(found["device_bytes"]["value"])
    assert sum(term["value"] for term in found["step"]) == pytest.approx(found["step_seconds"]["value"])
    budget = found["budgets"]["tokens"]
    assert budget["seconds"] == pytest.approx(1e12 / found["tokens_per_second"])
    assert budget["cost"] == pytest.approx(budget["seconds"] / 3600 * 64 * 2)
    assert found["parameters"] == 6_738_415_616 and found["fits"] and found["search"] is None


def test_the_experiment_that_is_written_is_one_that_the_trainer_plans_as_it_was_chosen(tmp_path, capsys, trainer_env):
    """A dry run on 1,024 ranks of choices of groups and values that no shipped experiment has together."""
    path = tmp_path / "mine" / "experiment" / "chosen.yaml"
    words = ["model=llama31_70b", "task=causal_lm", "tokenizer.vocab_size=128256", "optimizer.betas=[0.9,0.98]"]
    words += ["name=x", "steps=10", "batch.global_size=1024", "task.sequence_length=4096", "schedule=constant"]
    assert main([*words, "cluster=h100_128x8", f"write={path}"]) == 0
    assert f"--config-dir {tmp_path / 'mine'} experiment=chosen" in capsys.readouterr().out
    command = [sys.executable, "-m", "trainer", "--config-dir", str(tmp_path / "mine"), "experiment=chosen"]
    environment = {**trainer_env, "WORLD_SIZE": "1024"}
    done = subprocess.run(
        [*command, "dry_run=true"], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "70,553,706,496 parameters" in done.stdout and '"world_size": 1024' in done.stdout
    assert "128 x 8 devices" in path.read_text()


@pytest.mark.dist
def test_the_experiment_that_is_written_trains(tmp_path, run_trainer):
    path = tmp_path / "mine" / "experiment" / "small.yaml"
    words = ["experiment=quickstart", "steps=2", "batch.global_size=8", "tokenizer.vocab_size=400", "logging=[console]"]
    words += ["model.d_model=16", "model.d_ff=32", "model.num_heads=2", "schedule.warmup=1", "eval.final_split=none"]
    words += ["task.max_source_length=400", "task.max_target_length=400", "log.every=1"]
    assert main([*words, "cluster=cpu_1x2", f"write={path}"]) == 0
    done = run_trainer(["--config-dir", str(tmp_path / "mine"), "experiment=small"], ranks=2).check()
    run = done.runs_dir / "small"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert json.loads((run / "plan.json").read_text())["world_size"] == 2
    assert config_from_yaml(run / "config.yaml").model["d_model"] == 16


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["experiment=decoder_7b_zero3", "cluster=h10_8x8"], "did you mean h100?"),
        (["experiment=decoder_7b_zero3", "cluster=h100_8x8", "tokens=-1"], "tokens=-1 is not above 0"),
        (["experiment=decoder_7b_zero3"], "cluster=... is missing"),
        (["experiment=decoder_7b_zero", "cluster=h100"], "did you mean decoder_7b_zero3?"),
        (["experiment=decoder_7b_zero3", "cluster=h100", "stepps=3"], "did you mean steps?"),
        (["experiment=decoder_7b_zero3", "cluster=h100_3x8"], "batch.global_size=1008 or 1032"),
        (["experiment=decoder_7b_zero3", "cluster=h100", "engine.tensor_parallel=3"], "does not divide the 8 ranks"),
        (["experiment=decoder_70b_zero3", "cluster=v100_16gb"], "smallest number of such nodes that fits"),
        (
            ["experiment=decoder_7b_zero3", "engine=zero1", "cluster=h100", "engine.recompute=none"],
            "does not fit as it",
        ),
        ([*SEVEN, "write=chosen.yaml"], "write=experiment/chosen.yaml"),
        ([*SEVEN, "--config-dir", "nowhere"], "--config-dir nowhere is no folder"),
        ([*SEVEN, "choos=true"], "did you mean"),
    ],
)
def test_what_cannot_be_is_refused_in_words(words, told, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_what_a_file_cannot_say_is_not_written(capsys, tmp_path):
    path = tmp_path / "experiment" / "chosen.yaml"
    assert main([*SEVEN, "~optimizer.amsgrad", f"write={path}"]) == 2
    assert "cannot be written" in capsys.readouterr().err and not path.exists()


def test_help_is_quick():
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "launch.planner", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert time.perf_counter() - began < 2 and "choose=" in done.stdout
