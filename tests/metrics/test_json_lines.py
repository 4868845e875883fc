"""A file of one JSON object a line, on a disk that has no room for a while."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from chaos_faults import full
from chaos_job import small_disk

from trainer.metrics.json_lines import JsonLines


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
