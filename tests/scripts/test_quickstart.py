"""scripts/quickstart.sh from a finished set-up, with a model that learns nothing in its few steps."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    *("steps=4", "schedule.warmup=1", "batch.global_size=48", "eval.every=2", "eval.max_samples=8"),
    *("model.d_model=32", "model.num_heads=2", "model.d_ff=64", "model.encoder_layers=1", "model.decoder_layers=1"),
)


def quickstart(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts" / "quickstart.sh"), *words]
    env = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    return subprocess.run(command, cwd="/", env=env, text=True, capture_output=True, timeout=280)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.skipif(not (ROOT / ".venv" / ".shardwright-stamp").exists(), reason="scripts/setup.sh has not run here")
def test_it_trains_shows_translations_and_re_uses_them(tmp_path: Path) -> None:
    first = quickstart(*TINY, f"runs_dir={tmp_path}", "name=tiny")
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    assert "BLEU of copying the source 8.80" in first.stdout and "nrefs:1|case:mixed" in first.stdout
    assert first.stdout.count("\ntranslation ") == 10
    for file in ("metrics.jsonl", "ds_config.json", "report.html", "report.png", "evaluation.json", "wandb"):
        assert (tmp_path / "tiny" / file).exists()
    trained = (tmp_path / "tiny" / "metrics.jsonl").read_bytes()
    second = quickstart(f"runs_dir={tmp_path}", "name=tiny")
    assert second.returncode == 0 and "not trained again" in second.stdout
    assert (tmp_path / "tiny" / "metrics.jsonl").read_bytes() == trained


@pytest.mark.skipif(not (ROOT / ".venv" / ".shardwright-stamp").exists(), reason="scripts/setup.sh has not run here")
def test_a_refused_configuration_ends_it_with_the_reason(tmp_path: Path) -> None:
    done = quickstart("stepz=4", f"runs_dir={tmp_path}")
    assert done.returncode != 0 and "stepz" in done.stdout + done.stderr
    assert "BLEU" not in done.stdout and list(tmp_path.iterdir()) == []
