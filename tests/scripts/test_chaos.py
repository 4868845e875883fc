"""A short session of scripts/chaos.py, and that it would see what it looks for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from chaos_checks import check_run
from chaos_job import Failure

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("kill_rank", "kill_launcher", "term_rank", "fill_disk", "start_on_full_disk", "damage", "break_data")


def lose_a_sample(run: Path) -> None:
    path = run / "samples" / "rank_00000.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def change_a_loss(run: Path) -> None:
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[20]["loss"] *= 1 + 1e-12
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def leave_a_file(run: Path) -> None:
    (run / "checkpoints" / ".partial_step_00000007").mkdir()
    (run / "checkpoints" / ".partial_step_00000007" / "shard_00000.safetensors").touch()


def forget_the_end(run: Path) -> None:
    path = run / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": "running"}))


TAMPERINGS: dict[Callable[[Path], None], str] = {
    lose_a_sample: r"step 40 has samples of ranks",
    change_a_loss: r"loss of step 21 is",
    leave_a_file: r"left over .*\.partial_step_00000007",
    forget_the_end: r"status\.json says",
}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_shot_at_six_times_is_the_run_that_nobody_shot_at(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "scripts" / "chaos.py"), "--rounds", "6", "--seed", "34", "--out", str(out)]
    command += ["--kinds", ",".join(KINDS)]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=580)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == json.loads((out / "chaos.json").read_text())
    assert told["failures"] == [] and sum(told["rounds"].values()) == 6
    reference = next((out / "references").iterdir())
    for tamper, message in TAMPERINGS.items():
        spoilt = tmp_path / tamper.__name__
        shutil.copytree(reference, spoilt)
        check_run(spoilt, reference, exact=True)
        tamper(spoilt)
        with pytest.raises(Failure, match=message):
            check_run(spoilt, reference, exact=True)
