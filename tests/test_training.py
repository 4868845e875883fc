"""The promises of a run, by real processes: one curve however it is split, and a resumed run that nobody can tell from
an uninterrupted one."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TINY = (
    "experiment=quickstart",
    "model={d_model: 32, num_heads: 2, d_ff: 64, encoder_layers: 1, decoder_layers: 1, dropout: 0.0}",
    "tokenizer={vocab_size: 400, max_records: 2000}",
    "task={max_source_length: 400, max_target_length: 400}",
    "batch.global_size=48",
    "data.block=32",  # the first batch waits for a whole one
    "schedule.warmup=1",
    "log.every=1",
    "eval={every: 0, final_split: none}",
    "checkpoint.every=0",
    "logging=[]",
)
ENGINES = [("plain", 1), ("plain", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)]


def tiny(*more: str) -> list[str]:
    words = [word for word in TINY if "={" not in word]
    for word in TINY:
        if "={" in word:
            group, _, values = word.partition("=")
            words += [f"{group}.{pair.replace(': ', '=')}" for pair in values.strip("{}").split(", ")]
    return [*words, *more]


def rows(runs_dir: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (runs_dir / name / "metrics.jsonl").read_text().splitlines()]


def curve(runs_dir: Path, name: str) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(runs_dir, name) if "loss" in row}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_fp32_curve_does_not_depend_on_the_split(run_trainer):
    """plain x 1 rank, ZeRO-1/2/3 x 2 ranks, accumulation 1, 2 and 4, token budgets, shared matrices and sequences: 50
    steps within 1e-5."""
    common = tiny("precision=fp32", "steps=50", "model.num_heads=4")
    run_trainer([*common, "name=one"])
    splits = {
        "accumulation2": (["batch.micro_size=24"], 1),
        "accumulation4": (["batch.micro_size=12"], 1),
        "tokens": (["batch.micro_tokens=300"], 1),
        "plain": ([], 2),
        "zero1": (["engine=zero1", "batch.micro_size=12"], 2),
        "zero2": (["engine=zero2", "batch.micro_size=6"], 2),
        "zero2tokens": (["engine=zero2", "batch.micro_tokens=200"], 2),
        "zero3": (["engine=zero3", "batch.micro_size=12"], 2),
        "matrices": (["engine=zero1", "engine.tensor_parallel=2", "batch.micro_size=12"], 2),
        "sequences": (["engine=zero2", "engine.sequence_parallel=2", "batch.micro_tokens=300"], 2),
        "both": (["engine=zero3", "engine.tensor_parallel=2", "engine.sequence_parallel=2"], 4),
    }
    for name, (words, ranks) in splits.items():
        done = run_trainer([*common, f"name={name}", *words], ranks=ranks).check()
    reference = curve(done.runs_dir, "one")
    assert len(reference) == 50 and reference[50] < reference[1]
    for name in splits:
        losses = curve(done.runs_dir, name)
        worst = max(abs(losses[step] - loss) / loss for step, loss in reference.items())
        assert worst < 1e-5, f"{name} differs by {worst:.1e}"
        for row, expected in zip(rows(done.runs_dir, name)[:2], rows(done.runs_dir, "one")[:2], strict=True):
            assert row["norms"] == pytest.approx(expected["norms"], rel=1e-5), name


@pytest.mark.dist
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("engine", "ranks"), ENGINES)
def test_a_resumed_run_goes_on_to_the_last_bit(run_trainer, engine, ranks, precision):
    """Dropout on. The run is cut at step 4 by taking away what came later, then started again by the same command."""
    common = tiny(
        f"engine={engine}", f"precision={precision}", "steps=8", "checkpoint.every=4", "checkpoint.keep=5",
        "model.dropout=0.1", "data.trace=true", "name=run",
    )  # fmt: skip
    runs_dir = run_trainer(common, ranks=ranks).check().runs_dir
    whole, traces = rows(runs_dir, "run"), traced(runs_dir / "run")
    shutil.rmtree(runs_dir / "run" / "checkpoints" / "step_00000008")
    resumed = run_trainer(common, ranks=ranks).check()
    assert "after step 4" in resumed.stdout
    facts = ("step", "loss", "grad_norm", "lr", "tokens", "samples", "epoch", "padding_fraction")
    steps = [row for row in rows(runs_dir, "run") if "loss" in row]
    assert [[row[fact] for fact in facts] for row in steps] == [
        [row[fact] for fact in facts] for row in whole if "loss" in row
    ]
    assert traced(runs_dir / "run") == traces


def traced(run: Path) -> dict[str, list]:
    return {path.name: path.read_text().splitlines() for path in sorted((run / "samples").glob("*.jsonl"))}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_checkpoint_goes_on_with_any_engine_and_number_of_ranks(run_trainer):
    """ZeRO-2 on 2 ranks -> plain on 1 -> ZeRO-3 on 2 -> plain on 2: curve and samples stay those of one run."""
    common = tiny("precision=fp32", "checkpoint.every=3", "data.trace=true")
    runs_dir = run_trainer([*common, "name=one", "steps=12", "schedule=constant"]).check().runs_dir
    for steps, engine, ranks in [(3, "zero2", 2), (6, "plain", 1), (9, "zero3", 2), (12, "plain", 2)]:
        words = [*common, "name=relay", f"steps={steps}", f"engine={engine}", "schedule=constant"]
        run_trainer(words, ranks=ranks).check()
    one, relay = curve(runs_dir, "one"), curve(runs_dir, "relay")
    assert sorted(relay) == list(range(1, 13))
    assert relay == pytest.approx(one, rel=1e-5)
    assert samples_by_step(runs_dir / "relay") == samples_by_step(runs_dir / "one")


def samples_by_step(run: Path) -> dict[int, list[str]]:
    """The ids of each step, as dealt: rank 0's first, rank 1's first, rank 0's second ..."""
    by_step: dict[int, dict[int, list[str]]] = {}
    for lines in traced(run).values():
        for line in map(json.loads, lines):
            by_step.setdefault(line["step"], {})[line["rank"]] = line["ids"]
    return {
        step: [identity for turn in zip(*(ranks[rank] for rank in sorted(ranks)), strict=True) for identity in turn]
        for step, ranks in by_step.items()
    }


@pytest.mark.dist
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launchers_give_the_same_result(run_trainer, launcher):
    common = tiny("precision=fp32", "steps=3", "engine=zero2")
    done = run_trainer([*common, "name=launched"], ranks=2, launcher=launcher).check()
    alone = run_trainer([*common, "name=alone"]).check()
    assert curve(alone.runs_dir, "alone") == pytest.approx(curve(done.runs_dir, "launched"), rel=1e-5)
    assert json.loads((done.runs_dir / "launched" / "plan.json").read_text())["world_size"] == 2


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["steps=4"], "steps: 4 of 4"),
        (["stop.tokens=900"], "stop.tokens"),
        (["stop.minutes=0.0001"], "stop.minutes"),
        (
            ["stop.patience=2", "eval.every=2", "eval.max_samples=20", "optimizer.lr=0", "eval.generate=false"],
            "converged",
        ),
    ],
)
def test_a_run_says_why_it_ended(run_trainer, words, reason):
    done = run_trainer(tiny("steps=60", "schedule=constant", "schedule.warmup=0", "name=run", *words)).check()
    status = json.loads((done.runs_dir / "run" / "status.json").read_text())
    assert status["state"] == "finished" and status["exit_code"] == 0
    assert reason in status["reason"]


def test_every_sample_of_an_epoch_once(run_trainer):
    done = run_trainer(
        tiny(
            "steps=60",
            "name=run",
            "stop.epochs=1",
            "batch.global_size=4800",
            "batch.micro_tokens=20000",
            "data.trace=true",
        )
    ).check()
    assert "stop.epochs: 1 passes" in json.loads((done.runs_dir / "run" / "status.json").read_text())["reason"]
    ids = [identity for ids in samples_by_step(done.runs_dir / "run").values() for identity in ids]
    assert (
        len(ids)
        == len(set(ids))
        == [row for row in rows(done.runs_dir, "run") if "samples" in row][-1]["samples"]
        > 22_000
    )


def test_a_signal_saves_and_asks_to_be_run_again(tmp_path, trainer_env):
    words = tiny("steps=100000", "name=run", f"runs_dir={tmp_path}", "logging=[console]")
    command = [sys.executable, "-m", "trainer", *words]
    with subprocess.Popen(command, env=trainer_env, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.split()[:2] == ["step", "3/100000"]:
                process.send_signal(signal.SIGTERM)
                break
        process.stdout.read()
        assert process.wait(60) == 75
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "preempted" and status["exit_code"] == 75
    assert (tmp_path / "run" / "checkpoints" / f"step_{status['step']:08d}" / "manifest.json").exists()


def test_start_up_says_what_will_happen(run_trainer):
    done = run_trainer(tiny("steps=1", "name=run", "batch.micro_size=12")).check()
    for fact in ("EncoderDecoder", "48 = 12 micro x 4 accumulation x 1 ranks", "0.003 first", "bf16", "runs/run"):
        assert fact in done.stdout
    run = done.runs_dir / "run"
    for name in ("config.yaml", "overrides.yaml", "plan.json", "ds_config.json", "metrics.jsonl", "tokenizer.json"):
        assert (run / name).exists(), name
    assert time.time() - (run / "status.json").stat().st_mtime < 600
