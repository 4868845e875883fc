"""A file of one JSON object a line: cut back by a resume, and on a disk that has no room for a while."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
from chaos_faults import full
from chaos_job import small_disk

from trainer.metrics.json_lines import JsonLines, truncate_after


def test_lines_wait_for_room_on_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk", 64 << 10) as mounted:
        if not mounted:
            pytest.skip("not permitted to mount a small disk")
        path = tmp_path / "disk" / "lines.jsonl"
        lines = JsonLines(path, last_step=0)
        lines.write({"step": 1})
        with full(path.parent), caplog.at_level(logging.WARNING):
            for step in (2, 3):
                lines.write({"step": step, "text": "x" * 5000})  # the rest of the first page, and no more
            size = path.stat().st_size
        assert 0 < size <= 4096 and [record.getMessage().partition(". ")[2] for record in caplog.records] == [
            "Its lines wait in memory until there is room."
        ]
        lines.write({"step": 4})
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
        lines.close()


ROWS: list[dict[str, object]] = [
    {"step": 0, "event": "begun"},
    {"step": 10, "loss": 1.0},
    {"step": 12, "event": "skipped"},
    {"step": 20, "loss": 1.0},
    {"step": 20, "eval/loss": 1.0},
    {"step": 10, "event": "the checkpoint of step 10 was not written"},
    {"step": 27, "event": "skipped"},
    {"step": 29, "event": "skipped"},
    {"step": 30, "loss": 1.0},
    {"step": 19, "event": "told late"},
    {"step": 40, "loss": 1.0},
]


@pytest.mark.parametrize("torn", ["", '{"step": 41, "lo', "\0" * 50])
@pytest.mark.parametrize("last_step", [-1, 0, 9, 10, 11, 12, 20, 25, 27, 28, 30, 39, 40, 50, math.inf])
def test_a_resume_cuts_before_the_first_line_that_is_ahead(tmp_path: Path, last_step: float, torn: str) -> None:
    """Events may be told late."""
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + torn)
    ahead = next((place for place, row in enumerate(ROWS) if float(str(row["step"])) > last_step), len(ROWS))
    JsonLines(path, last_step).close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS[:ahead]


def test_a_resume_looks_at_few_lines_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": 2.5}}\n' for step in range(1, 100_001)))
    looked = []

    def step_of(line: bytes) -> float:
        looked.append(line)
        return float(json.loads(line)["step"])

    truncate_after(path, 60_000, step_of)
    assert path.read_bytes().endswith(b'\n{"step": 60000, "loss": 2.5}\n') and len(looked) < 50
