"""Scores of a reference, from a run's directory to the columns that preference tuning reads."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from trainer.config import config_from_yaml
from trainer.reference_scores import main

TALK = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
PAIRS = [
    {"prompt": "Why?", "chosen": "So.", "rejected": "Because.", "n": 1},
    {"prompt": "a", "chosen": "b", "rejected": "c", "n": 2},
]
TOO_LONG = {"prompt": "x" * 300, "chosen": "b", "rejected": "c", "n": 3}
TINY = (
    *("steps=1", "schedule.warmup=0", "logging=[]", "eval.final_split=none", "eval.every=0", "precision=fp32"),
    *("tokenizer.vocab_size=260", "model.d_model=16", "batch.global_size=2"),
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, records in (("chat", [TALK] * 4), ("pairs", [*PAIRS, TOO_LONG])):
        (tmp_path / name).mkdir()
        for split in ("train", "validation", "test"):
            (tmp_path / name / f"{split}.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records))
    return tmp_path


def test_a_preference_run_begins_where_its_reference_ended(
    run_trainer, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first loss is ln 2; without the scores it is refused, with the command that makes them."""
    chat = ["experiment=chat_small", "tokenizer=byte", f"data.path={data / 'chat'}", "name=chat", *TINY]
    runs = run_trainer(chat).check().runs_dir
    words = [f"runs_dir={runs}", f"data={data / 'pairs'}", f"to={data / 'scored'}"]
    assert main(["run=chat", *words]) == 0
    assert "train: 2 pairs, " in (told := capsys.readouterr().out) and "1 left out, the first: 3" in told
    rows = pq.read_table(data / "scored" / "train.parquet").to_pylist()
    assert [row["n"] for row in rows] == [1, 2] and all(row["chosen_logp"] < 0 for row in rows)
    tuned = ["experiment=dpo_small", "name=dpo", "init_from=run:chat", f"tokenizer.path={runs / 'chat'}", *TINY]
    refused = run_trainer([*tuned, f"data.path={data / 'pairs'}"])
    assert refused.returncode == 2 and "python -m trainer.reference_scores" in refused.stderr
    run_trainer([*tuned, f"data.path={data / 'scored'}"]).check()
    first = json.loads((runs / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert config_from_yaml(runs / "dpo" / "config.yaml").task["reference_columns"] == ["chosen_logp", "rejected_logp"]


def test_what_cannot_be_scored_is_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = f"runs_dir={data}"
    assert main(["run=x", place, f"data={data / 'chat'}", f"to={data / 'out'}"]) == 2
    assert "no column prompt" in capsys.readouterr().err
    assert main(["run=x", place, f"data={data / 'pairs'}", f"to={data / 'chat'}"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["run=x", place, f"data={data / 'pairs'}", f"to={data / 'out'}", "batch_size=0"]) == 2
    assert main(["run=x", place, f"data={data / 'pairs'}", f"to={data / 'out'}"]) == 2
    assert "run=x: there is no" in capsys.readouterr().err
    assert not (data / "out").exists()
