"""A checkpoint of any layout goes on in any other: ranks, engine, tensor and sequence parallelism, precision."""

from __future__ import annotations

import shutil

import pytest

from tests.test_training import curve, tiny

COMMON = tiny("precision=fp32", "schedule=constant", "model.num_heads=4", "model.d_model=32", "checkpoint.keep=1")
FROM = {
    "plain_3": (["engine=plain"], 3),
    "zero1_2": (["engine=zero1"], 2),
    "zero2_4": (["engine=zero2"], 4),
    "zero3_2": (["engine=zero3_offload"], 2),
    "zero3_tp2_4": (["engine=zero3", "engine.tensor_parallel=2"], 4),
}
TO = {
    "plain_1": (["engine=plain"], 1),
    "plain_tp2_2": (["engine=plain", "engine.tensor_parallel=2"], 2),
    "zero2_8": (["engine=zero2"], 8),
    "zero3_4": (["engine=zero3"], 4),
    "zero3_tp2_sp2_4": (["engine=zero3_offload", "engine.tensor_parallel=2", "engine.sequence_parallel=2"], 4),
}
SAVED_AT = 2


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_layout_goes_on_in_every_other(run_trainer):
    """25 pairs: the first step after the change has the loss of the uninterrupted run, within 1e-5."""
    runs_dir = run_trainer([*COMMON, "name=whole", f"steps={SAVED_AT + 1}"]).check().runs_dir
    expected = curve(runs_dir, "whole")[SAVED_AT + 1]
    for name, (words, ranks) in FROM.items():
        run_trainer([*COMMON, f"name={name}", f"steps={SAVED_AT}", *words], ranks=ranks).check()
    for name, (words, ranks) in TO.items():
        pairs = [f"{name}_after_{source}" for source in FROM]
        for source, pair in zip(FROM, pairs, strict=True):
            shutil.copytree(runs_dir / source, runs_dir / pair)
        sweep = ["-m", *COMMON, f"name={','.join(pairs)}", f"steps={SAVED_AT + 1}", "resume=must", *words]
        run_trainer(sweep, ranks=ranks, timeout=300).check()
        for pair in pairs:
            assert curve(runs_dir, pair)[SAVED_AT + 1] == pytest.approx(expected, rel=1e-5), pair


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_precision_may_change(run_trainer):
    """Masters are fp32 in every precision: what bf16 has learnt goes on in fp32 on any layout alike, and back."""
    runs_dir = (
        run_trainer([*COMMON, "name=bf16", "precision=bf16", "steps=2", "engine=zero2"], ranks=2).check().runs_dir
    )
    for name, words, ranks in (("one", [], 1), ("sharded", ["engine=zero3"], 2)):
        shutil.copytree(runs_dir / "bf16", runs_dir / name)
        run_trainer([*COMMON, f"name={name}", "steps=3", "resume=must", *words], ranks=ranks).check()
    assert curve(runs_dir, "sharded")[3] == pytest.approx(curve(runs_dir, "one")[3], rel=1e-5)
    run_trainer([*COMMON, "name=sharded", "precision=bf16", "steps=4", "resume=must"]).check()
    assert curve(runs_dir, "sharded")[4] == pytest.approx(curve(runs_dir, "one")[3], rel=0.2)
