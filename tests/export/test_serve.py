"""From a training run to an agent: a chat model is exported, served, and asks for a tool until it can answer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import find_free_port

agent = pytest.importorskip("agent")
pytest.importorskip("uvicorn")

VERSIONS = {"vim": "9.0", "gcc": "12.2", "perl": "5.36"}


def conversation(name: str) -> dict:
    call = {"type": "function", "function": {"name": "package", "arguments": {"name": name}}}
    return {
        "messages": [
            {"role": "user", "content": f"Which version is {name}?"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": VERSIONS[name]},
            {"role": "assistant", "content": f"{name} is {VERSIONS[name]}."},
        ]
    }


@contextmanager
def served(folder: Path, log: Path) -> Iterator[str]:
    port = find_free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), f"--port={port}"]
    with log.open("w") as out:
        server = subprocess.Popen([*command, "--device=cpu", "--dtype=float32"], stdout=out, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trained_model_is_an_agent(run_trainer, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    lines = "".join(json.dumps(conversation(name)) + "\n" for name in VERSIONS)
    for split in ("train", "validation", "test"):
        (data / f"{split}.jsonl").write_text(lines * (8 if split == "train" else 1))
    words = [
        *("model=decoder", "task=chat", "data=files", f"data.path={data}", "tokenizer=bpe", "tokenizer.vocab_size=400"),
        *("model.d_model=64", "model.d_ff=128", "model.num_layers=2", "model.max_positions=256", "precision=fp32"),
        *("task.sequence_length=128", "steps=250", "batch.global_size=12", "optimizer.lr=4e-3", "schedule.warmup=10"),
        *("name=agent", "logging=[]", "eval.final_split=none", "data.lanes=8", "eval.generate=false"),
    ]
    runs = run_trainer(words).check().runs_dir
    exported = run_trainer(
        ["run=agent", f"to={tmp_path / 'out'}", "dtype=fp32", f"runs_dir={runs}"], module="trainer.export"
    )
    exported.check()
    with served(tmp_path / "out", tmp_path / "serve.log") as url:
        client = agent.OpenAI(base_url=url, api_key="none")
        said: list[str] = []
        asked: list[str] = []

        def package(name: str) -> str:
            asked.append(name)
            return VERSIONS[name]

        for name in ("vim", "perl"):
            messages = agent.converse(
                client, str(tmp_path / "out"), f"Which version is {name}?", {"package": package}, said.append
            )
            assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
            assert messages[-1]["content"].strip() == f"{name} is {VERSIONS[name]}."
        assert asked == ["vim", "perl"] and len(said) > 2, "the answer comes in pieces"
