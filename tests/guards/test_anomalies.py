"""Losses and gradients that are not finite or far above the usual: every engine leaves out exactly those updates, and
a run goes back, ends, and tells as it was asked to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.conftest import ROOT
from tests.test_training import curve, rows, samples_by_step
from trainer.config import GuardConfig
from trainer.guards.anomalies import Update, remember, scale_alarm
from trainer.state import TrainState

COMMON = (
    *("experiment=digits_mlp", "optimizer=adamw", "optimizer.lr=1e-3", "schedule=constant", "model.dropout=0"),
    *("steps=18", "batch.global_size=32", "data.trace=true", "log.every=1", "eval.final_split=none", "logging=[]"),
    *("allow_targets=[planted.]", "task._target_=planted.Planted"),
)


def planted(**turns) -> dict[str, str]:
    """The environment in which `tests.guards.planted.Planted` does what it does."""
    return {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "PLANTED": json.dumps(turns)}


def anomalies(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "anomalies.jsonl").read_text().splitlines()]


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def saved(run: Path, step: int) -> tuple[dict, dict]:
    """The tensors of a checkpoint by name, and its state.json."""
    folder, tensors = run / "checkpoints" / f"step_{step:08d}", {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return tensors, json.loads((folder / "state.json").read_text())


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_engine_leaves_out_the_same_updates(run_trainer):
    """A NaN at step 4, a loss spike at 14 and a gradient spike at 16, all on one rank of two."""
    splits = {
        "one": ("plain", 1, []),
        "plain": ("plain", 2, ["batch.micro_size=8"]),
        "zero2": ("zero2", 2, ["batch.micro_size=8"]),
        "zero3": ("zero3", 2, ["batch.micro_size=8"]),
        "zero1_bf16": ("zero1", 2, ["precision=bf16"]),
    }
    for name, (engine, ranks, words) in splits.items():
        more = ["guard.spike_factor=10", "checkpoint.every=1", "checkpoint.keep=50", f"name={name}", f"engine={engine}"]
        env = planted(nan=[4], loss=[14], gradient=[16], micro_batches=1 + len([w for w in words if "micro" in w]))
        runs_dir = run_trainer([*COMMON, *more, *words], ranks=ranks, env=env).check().runs_dir
        run = runs_dir / name
        told = [(line["step"], line["kind"], line["action"]) for line in anomalies(run)]
        assert told == [(4, "not finite", "skip"), (14, "loss spike", "skip"), (16, "gradient spike", "skip")], name
        ids = samples_by_step(run)
        assert all(sorted(line["ids"]) == sorted(ids[line["step"]]) for line in anomalies(run))
        assert [row["skipped_steps"] for row in rows(runs_dir, name) if "loss" in row][-1] == 3
        before, after = saved(run, 13)[0], saved(run, 14)[0]
        assert before.keys() == after.keys() and all(before[key].equal(after[key]) for key in before), name
        assert saved(run, 18)[1]["optimizer"]["step"] == 15
        assert all(tensor.isfinite().all() for tensor in saved(run, 18)[0].values())
    losses = {step: loss for step, loss in curve(runs_dir, "one").items() if step not in (4, 14)}
    assert curve(runs_dir, "one")[4] is None and losses[18] < losses[1]
    for name in ("plain", "zero2", "zero3"):
        assert {step: curve(runs_dir, name)[step] for step in losses} == pytest.approx(losses, rel=1e-5), name


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_a_rollback_goes_on_with_the_data_after_the_offending_step(run_trainer):
    """Turn 7 is step 7 and goes back to 5; turn 9 is step 7 once more."""
    words = [*COMMON, "engine=zero3", "steps=12", "guard.on_anomaly=rollback", "checkpoint.every=5", "name=run"]
    done = run_trainer(words, ranks=2, env=planted(nan=[3, 7, 9])).check()
    run, dealt, told = done.runs_dir / "run", samples_by_step(done.runs_dir / "run"), anomalies(done.runs_dir / "run")
    assert [(line["step"], line["action"]) for line in told] == [
        (3, "skip"), (7, "rollback to step 5"), (7, "rollback to step 5"),
    ]  # fmt: skip
    assert sorted(dealt) == list(range(1, 13)) == sorted(curve(done.runs_dir, "run"))
    assert sorted(told[0]["ids"]) == sorted(dealt[3])
    seen = [identity for ids in (*dealt.values(), told[1]["ids"], told[2]["ids"]) for identity in ids]
    assert len(seen) == len(set(seen)) == 14 * 32, "none is dealt twice"
    steps = [row["step"] for row in rows(done.runs_dir, "run")]
    assert steps == sorted(steps), "a resume cuts at the first step that is too high"
    state = saved(run, 12)[1]
    assert state["train"]["anomalies"] == [3, 7, 7] and state["optimizer"]["step"] == 11
    assert {lane["place"] for lane in state["lanes"].values()} == {16 * 32}, "twelve steps, and four that led nowhere"


def test_a_stop_leaves_the_step_before_and_can_be_passed(run_trainer):
    """What is usual comes from before the resume: a spike in its first step is one."""
    words = [*COMMON, "guard.spike_factor=10", "name=run"]
    done = run_trainer([*words, "guard.on_anomaly=stop"], env=planted(loss=[14]))
    run = done.runs_dir / "run"
    assert done.returncode == 1 and "Traceback" not in done.stderr and "guard.on_anomaly=stop" in done.stderr
    assert status(run)["state"] == "failed" and "step 14: loss spike (loss" in status(run)["reason"]
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000013"]
    run_trainer(words, env=planted(loss=[1])).check()
    assert status(run)["state"] == "finished" and max(curve(done.runs_dir, "run")) == 18
    stopped, skipped = anomalies(run)
    assert (stopped.pop("action"), skipped.pop("action")) == ("stop", "skip") and stopped == skipped
    assert stopped["loss"] > stopped["threshold"] and stopped["ids"] == samples_by_step(run)[14]


@pytest.mark.dist
def test_too_many_end_the_run(run_trainer):
    words = [*COMMON, "name=run", "guard.max_anomalies=2"]
    done = run_trainer(words, ranks=2, env=planted(nan=[2, 3, 6]))
    run = done.runs_dir / "run"
    assert done.returncode == 1 and "guard.max_anomalies=2" in done.stderr and "step 6" in done.stderr
    assert status(run)["state"] == "failed" and saved(run, 5)[1]["train"]["anomalies"] == [2, 3]
    assert [line["action"] for line in anomalies(run)] == ["skip", "skip", "stop"]


def test_the_lowest_loss_scale_of_fp16_is_told_once_it_stays():
    """Scales as DeepSpeed's scaler leaves them after each step; fp16 itself runs on GPUs alone."""
    guard, state, told = GuardConfig(), TrainState(), []
    falling = [2.0**power for power in range(16, 0, -1)]
    for scale in (*falling, *[1.0] * 5, 2.0, *[1.0] * 30, None, *[1.0] * 20):
        state = remember(guard, state.advance(1, 1, 0.0, 0.0), Update(1.0, loss_scale=scale))
        if (alarm := scale_alarm(state)) is not None:
            told.append((state.step, alarm))
    assert [step for step, _ in told] == [16 + 5 + 1 + 20, 16 + 5 + 1 + 30 + 1 + 20]
    assert "precision=fp16" in told[0][1] and "precision=bf16" in told[0][1]
    overflow = Update(float("inf"), loss_scale=1.0, anomaly="not finite")
    assert remember(guard, state, overflow).lowest_scale_steps == state.lowest_scale_steps + 1
