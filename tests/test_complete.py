"""TAB in a real bash: what stands in COMPREPLY after the function has run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bash() -> str:
    found = shutil.which("bash")
    if found is None:
        pytest.skip("no bash")
    return found


def press_tab(bash: str, line: str) -> list[str]:
    """The completions of a line with the cursor at its end."""
    script = f"""
        eval "$(python -m trainer.complete)"
        compopt() {{ :; }}  # which is for readline alone
        COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}
        _shardwright_complete
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([bash, "-c", script], env=environment, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python -m trainer experiment=digits", ["digits_cnn", "digits_mlp"]),
        ("torchrun --nproc_per_node=2 -m trainer experiment=quickstart engine=zero", ["zero1", "zero2", "zero3"]),
        ("deepspeed --module trainer experiment=quickstart batch.mi", ["batch.micro_size=", "batch.micro_tokens="]),
        ("python -m trainer experiment=quickstart steps=", ["1400"]),
        ("python script.py any", []),
    ],
)
def test_tab_completes(bash: str, line: str, expected: list[str]) -> None:
    assert press_tab(bash, line)[: len(expected)] == expected
