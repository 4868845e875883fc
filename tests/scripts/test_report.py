"""The scripts that show what came of a run, on a run directory made here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """A run directory with 30 logged steps, one evaluation and 40 translated sentences."""
    run = tmp_path / "runs" / "small"
    (run / "generations").mkdir(parents=True)
    rows = [{"step": step, "loss": 3 / step, "lr": 0.001, "tokens_per_second": 900.0} for step in range(1, 31)]
    evaluations = [{"step": 30, "eval/loss": 0.5}, {"step": 30, "split": "test", "eval/loss": 0.6}]
    lines = [json.dumps(row) + "\n" for row in [*rows, *evaluations]]
    (run / "metrics.jsonl").write_text("".join(lines))
    sentences = [
        {"source": f"This is sentence number {n}", "reference": f"Satz {n}", "hypothesis": f"Satz {n}!"}
        for n in range(40)
    ]
    generations = run / "generations" / "step_00000030.test.jsonl"
    generations.write_text("".join(json.dumps(row) + "\n" for row in sentences))
    evaluation = {"step": 30, "split": "test", "eval/bleu": 21.5, "eval/chrf": 44.0, "eval/copy_bleu": 8.8}
    signatures = {"bleu_signature": "nrefs:1|tok:13a", "chrf_signature": "nrefs:1|nc:6"}
    (run / "evaluation.json").write_text(json.dumps({**evaluation, **signatures}))
    (run / "config.yaml").write_text("name: small\n")
    return run


def call(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / script), *args]
    return subprocess.run(command, text=True, capture_output=True, timeout=120)


def test_report_shows_scores_sentences_and_files(finished_run: Path) -> None:
    done = call("report.py", str(finished_run))
    assert done.returncode == 0, done.stderr
    assert "BLEU 21.50   nrefs:1|tok:13a" in done.stdout
    assert "BLEU of copying the source 8.80" in done.stdout
    for label in ("source  ", "reference  ", "translation "):
        assert done.stdout.count(label) == 10
    for path in ("metrics.jsonl", "generations", "wandb", "report.html"):
        assert str(finished_run / path) in done.stdout
    assert (finished_run / "report.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_an_unfinished_run(tmp_path: Path) -> None:
    done = call("report.py", str(tmp_path))
    assert done.returncode == 1 and "evaluation.json" in done.stderr and "Traceback" not in done.stderr
