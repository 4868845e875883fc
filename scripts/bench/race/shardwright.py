"""Entrant shardwright: the command that a user gives, and an observer (a sink) that writes the events.

Its settings are those that docs/data.md recommends: packed rows, as many pairs a step on average as the others have."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import Events, size_of

FULL = 0.96
"""The share of a packed row's positions that pairs fill."""


class Observer:
    """A sink of the trainer."""

    def __init__(self, out: str) -> None:
        self._events = Events(out)
        self._events.write("start", pid=os.getpid())

    def open(self, run: Any) -> None:
        """All is built."""
        self._events.write("ready")

    def log(self, info: Any) -> None:
        """After a step."""
        facts = {"target_tokens": info.target_tokens, "loss": info.loss, "padding": info.padding_fraction}
        self._events.write("step", step=info.step, **facts, samples=info.samples)

    def log_evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """After an evaluation."""
        self._events.write("validated", step=step, loss=metrics["eval/loss"])

    def event(self, step: int, message: str) -> None:
        """Nothing that the race wants to know."""

    def close(self, status: str) -> None:
        """The run ends."""
        self._events.write("end", status=status)


def command(spec: Mapping[str, Any]) -> list[str]:
    """The words of the command line, after the Python."""
    trainer = ["-m", "trainer"]
    if spec["ranks"] > 1:
        trainer = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={spec['ranks']}", *trainer]
    settings = spec["optimizer"]
    save = spec["save_every"] or spec["save_at"] or 0
    words = {
        "name": "run",
        "runs_dir": spec["out"],
        "seed": spec["seed"],
        "steps": spec["steps"],
        "precision": spec["precision"],
        "engine": spec["engine"],
        "data": "files",
        "data.path": Path(spec["data"]["train"]).parent,
        "data.batching": "packed",
        "tokenizer": "file",
        "tokenizer.path": spec["tokenizer"],
        "tokenizer.vocab_size": spec["vocab_size"],
        **_task_and_model(spec),
        **{f"optimizer.{key}": settings[key] for key in ("lr", "eps", "weight_decay")},
        "optimizer.betas": _list(settings["betas"]),
        "clip_norm": settings["clip_norm"],
        "schedule": "inverse_square_root",
        "schedule.warmup": settings["warmup"],
        "log.every": 1,
        "log.norms": "none",  # by default of every tenth step alone
        "logging": "[]",
        "+logging.race": f"{{_target_:shardwright.Observer,out:{spec['out']}}}",
        "allow_targets": "[shardwright.]",
        "checkpoint.every": save,
        "checkpoint.keep": 1 if spec["save_at"] else 10_000,
        "eval.every": spec["validate_every"],
        "eval.max_samples": spec["validation_samples"],
        "eval.generate": "false",
        "eval.final_split": "none",
    }
    return [*trainer, *(f"{key}={value}" for key, value in words.items())]


def _task_and_model(spec: Mapping[str, Any]) -> dict[str, Any]:
    shape = {f"model.{key}": value for key, value in spec["model"].items()}
    if spec["kind"] == "packed":
        return {
            "task": "causal_lm",
            "task.sequence_length": spec["max_length"],
            "task.overlong": "split",
            "batch.global_size": spec["batch"],
            "model": "decoder",
            "model.max_positions": spec["max_length"],
            "model.tie_embeddings": "true",
            **shape,
        }
    rows, lengths = packed_rows(spec)
    return {
        "task": "translation",
        "task.source_column": "source",
        "task.target_column": "target",
        "task.label_smoothing": 0.0,
        "task.max_source_length": spec["max_length"],
        "task.max_target_length": spec["max_length"],
        "task.length_penalty_kind": "power",
        "data.row_length": _list(lengths),
        "batch.global_size": rows,
        "model": "marian",
        "model.head_bias": "false",
        "model.max_positions": spec["max_length"],
        **shape,
    }


def packed_rows(spec: Mapping[str, Any]) -> tuple[int, list[int]]:
    """Rows a step, which the ranks share, and their source and target positions: as short as the longest text allows,
    and as many as hold `batch` pairs on average."""
    ranks, positions = spec["ranks"], [mean * spec["batch"] / FULL for mean in spec["mean_lengths"]]
    rows = max(int(min(positions) / spec["max_length"]) // ranks * ranks, ranks)
    return rows, [max(round(side / rows), spec["max_length"]) for side in positions]


def _list(values: Any) -> str:
    return f"[{','.join(map(str, values))}]"


def environment() -> dict[str, str]:
    """Where the trainer and the observer are found."""
    here = Path(__file__).resolve().parent
    return {"PYTHONPATH": os.pathsep.join([str(here.parents[2]), str(here), os.environ.get("PYTHONPATH", "")])}


def translate_command(spec: Mapping[str, Any]) -> list[str]:
    """As `command`, for `spec["translate"]`."""
    told = spec["translate"]
    words = {"run": "run", "runs_dir": spec["out"], "checkpoint": told["checkpoint"], "input": told["input"]}
    words |= {"output": told["output"], "beam_size": told["beams"], "allow_targets": "[shardwright.]"}
    return ["-m", "trainer.generate", *(f"{key}={value}" for key, value in words.items())]


def note_checkpoints(spec: Mapping[str, Any]) -> None:
    """Add the events of saving, which no sink is told of: a manifest is the last that is written of a checkpoint."""
    with (Path(spec["out"]) / "events_0.jsonl").open("a", encoding="utf-8") as file:
        for manifest in sorted((Path(spec["out"]) / "run" / "checkpoints").glob("step_*/manifest.json")):
            folder = manifest.parent
            step = int(folder.name.split("_")[1])
            facts = {"path": str(step), "bytes": size_of(folder), "step": step}
            file.write(json.dumps({"event": "saved", "time": manifest.stat().st_mtime, **facts}) + "\n")


if __name__ == "__main__":
    sys.exit("this entrant has no program of its own: race.py gives the trainer's command")
