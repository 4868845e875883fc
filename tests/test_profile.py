"""A recorded run: what is in its trace, and that the table's rows sum to the step."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

WORDS = ("experiment=digits_mlp", "steps=8", "debug.profile_after=3", "debug.profile_steps=4", "eval.final_split=none")


@pytest.mark.dist
@pytest.mark.parametrize("engine", ["plain", "zero2"])
def test_sections_sum_to_the_step(run_trainer: Callable[..., Any], engine: str) -> None:
    done = run_trainer([*WORDS, "log.every=1", f"engine={engine}", "logging=[]", "name=run"], ranks=2).check()
    folder = done.runs_dir / "run" / "profile"
    for rank in (0, 1):
        facts = json.loads((folder / f"sections_rank_{rank:05d}.json").read_text())
        assert facts["steps"] == 4 and facts["rank"] == rank
        assert {"data", "agree", "forward", "backward", "optimizer", "log"} <= set(facts["sections"])
        assert ("reduce" in facts["sections"]) == (engine == "plain")
        assert sum(facts["sections"].values()) == pytest.approx(facts["step_seconds"])
    rows = map(json.loads, (folder.parent / "metrics.jsonl").read_text().splitlines())
    measured = [row["step_seconds"] for row in rows if "loss" in row and 3 < row["step"] <= 7]
    assert facts["step_seconds"] == pytest.approx(sum(measured) / 4, rel=0.5)
    trace = json.loads((folder / "trace_rank_00000.json").read_text())["traceEvents"]
    names = [event.get("name") for event in trace]
    assert names.count("section: optimizer") >= 4 and any("aten::addmm" in str(name) for name in names)
    assert "a step, by its sections" in done.output and "100.0 %" in done.output


def test_a_run_that_is_too_short_says_so(run_trainer: Callable[..., Any]) -> None:
    done = run_trainer([*WORDS, "debug.profile_after=100", "logging=[]", "name=run"]).check()
    assert "nothing was recorded: 8 steps were taken" in done.output
    assert not (done.runs_dir / "run" / "profile").exists()
