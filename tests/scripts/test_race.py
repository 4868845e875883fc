"""The race: a short one from end to end, and what its figures make of events."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "bench"


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for folder in (BENCH / "race", BENCH):
        monkeypatch.syspath_prepend(str(folder))
    from race import learning

    return learning


def events_of_a_run() -> list[dict[str, object]]:
    """Ten steps of a second and 50 tokens; 5 seconds of validation after every other, checkpoints after 4 and 8."""
    events: list[dict[str, object]] = [{"event": "start", "time": 90.0}]
    now = 99.0
    for step in range(1, 11):
        now += 1.0
        events.append({"event": "step", "time": now, "step": step, "target_tokens": 50, "padding": 0.1})
        if step % 4 == 0:
            events.append({"event": "saved", "time": now + 0.1, "step": step, "path": f"step {step}", "bytes": 7})
        if step % 2 == 0:
            now += 5.0
            events.append({"event": "validated", "time": now, "step": step, "loss": 6.0 - step / 2})
    return events


def test_a_course_counts_training_and_leaves_validation_out(learning: ModuleType) -> None:
    course = learning.Course([events_of_a_run(), events_of_a_run()])
    assert course.at(1) == (0.0, 100) and course.at(10)[1] == 1000  # both ranks
    assert course.at(8)[0] == pytest.approx(7.0, abs=0.5)
    assert course.last_saved(tokens=799) == (4, "step 4") and course.last_saved() == (8, "step 8")
    assert course.seconds_to(3.5) == pytest.approx(4.0, abs=0.5) and course.seconds_to(0.5) is None


def test_rows_hold_the_pairs_of_the_others(learning: ModuleType) -> None:
    from race import shardwright

    spec = {"ranks": 2, "batch": 64, "max_length": 64, "mean_lengths": [11.0, 13.0]}
    rows, (source, target) = shardwright.packed_rows(spec)
    assert rows % 2 == 0 and source >= 64 and target >= 64
    assert rows * source * shardwright.FULL / 11.0 == pytest.approx(64, rel=0.02)
    assert rows * target * shardwright.FULL / 13.0 == pytest.approx(64, rel=0.02)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_race_writes_a_table_and_a_picture(tmp_path: Path) -> None:
    told = ["--laps", "tiny", "--entrants", "shardwright,bare,hf", "--ranks", "1", "--work", str(tmp_path)]
    command = [sys.executable, str(BENCH / "race.py"), *told, "--rounds", "2", "--seconds", "0.3", "--steps", "2"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=850)
    assert done.returncode == 0 and not done.stderr, done.stderr
    (heat,) = json.loads((tmp_path / "figures.json").read_text()).values()
    assert list(heat) == ["shardwright", "bare", "hf"]
    for name, one in heat.items():
        assert len(one["rates"]) == 2 and one["steps"] >= 4 and one["start_seconds"] > 0, name
        assert one["memory_bytes"] > 100 * 2**20 and one["checkpoint_bytes"] > 0, name
        assert one["tokens_per_step"] == pytest.approx(16 * 14.25, rel=0.25), name  # the same pairs a step
    assert heat["shardwright"]["padding"] < 0.1 < heat["hf"]["padding"]
    assert (tmp_path / "table.md").read_text().count("| hf |") == 1
    assert (tmp_path / "race.png").read_bytes().startswith(b"\x89PNG")
