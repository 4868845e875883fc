"""What must be true of a run that was shot at: it is, line for line, the run that nobody shot at."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from chaos_job import STEPS, Failure

EXACT = ("loss", "grad_norm", "lr", "tokens", "samples", "epoch", "padding_fraction")
"""What a logged step says of training, and not of time or memory."""

FILES = re.compile(
    r"(config|overrides)\.yaml|(plan|ds_config|status|tokenizer)\.json|(metrics|quarantine)\.jsonl"
    r"|checkpoints/(latest|(\.damaged_)?step_\d{8}/(manifest\.json|state\.json|shard_\d{5}\.safetensors))"
    r"|heartbeats/rank_\d{5}\.json|logs/(rank_\d{5}\.log|stacks_rank_\d{5}\.txt)|samples/rank_\d{5}\.jsonl|wandb/.*"
)
"""What a run directory may hold."""


def check_run(run: Path, reference: Path, exact: bool) -> None:
    """Raises Failure with the first promise that `run` broke. exact: to the last bit, else losses within 1e-5."""
    status = json.loads((run / "status.json").read_text(encoding="utf-8"))
    if (status["state"], status["step"], status["exit_code"]) != ("finished", STEPS, 0):
        raise Failure(f"status.json says {status}")
    strays = [
        name for path in run.rglob("*") if path.is_file() and not FILES.fullmatch(name := str(path.relative_to(run)))
    ]
    if strays:
        raise Failure(f"left over in the run directory: {', '.join(sorted(strays))}")
    _check_samples(run, reference)
    _check_curve(run, reference, exact)
    latest, folders = (run / "checkpoints" / "latest").read_text().strip(), (run / "checkpoints").glob("step_*")
    if latest != max(path.name for path in folders) or not latest.endswith(f"_{STEPS:08d}"):
        raise Failure(f"checkpoints/latest names {latest}")


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def samples_by_step(run: Path) -> dict[int, list[str]]:
    """The ids of each step, as dealt: rank 0's first, rank 1's first, rank 0's second ... Raises Failure where a rank
    tells a step twice or out of order."""
    by_step: dict[int, dict[int, list[str]]] = {}
    for path in sorted((run / "samples").glob("rank_*.jsonl")):
        last = 0
        for row in _rows(path):
            if row["step"] <= last:
                raise Failure(f"samples/{path.name}: step {row['step']} after step {last}")
            last = row["step"]
            by_step.setdefault(last, {})[row["rank"]] = row["ids"]
    dealt = {}
    for step, ranks in sorted(by_step.items()):
        if sorted(ranks) != list(range(len(ranks))) or len({len(ids) for ids in ranks.values()}) != 1:
            raise Failure(f"step {step} has samples of ranks {sorted(ranks)}, {[len(ids) for ids in ranks.values()]}")
        dealt[step] = [name for turn in zip(*(ranks[rank] for rank in sorted(ranks)), strict=True) for name in turn]
    return dealt


def _check_samples(run: Path, reference: Path) -> None:
    wanted, dealt = samples_by_step(reference), samples_by_step(run)
    if missing := set(wanted) ^ set(dealt):
        raise Failure(f"samples/: steps {sorted(missing)} are missing, or too many")
    for step, names in wanted.items():
        if dealt[step] != names:
            raise Failure(f"samples/: step {step} has {dealt[step]}, an uninterrupted run {names}")
    every = [name for names in dealt.values() for name in names]
    if len(set(every)) != len(every):
        raise Failure(f"samples/: {len(every) - len(set(every))} samples were dealt twice within an epoch")


def _check_curve(run: Path, reference: Path, exact: bool) -> None:
    wanted, found = ([row for row in _rows(path / "metrics.jsonl") if "loss" in row] for path in (reference, run))
    if [row["step"] for row in found] != [*range(1, STEPS + 1)]:
        raise Failure(f"metrics.jsonl has steps {[row['step'] for row in found]}")
    for one, other in zip(wanted, found, strict=True):
        for fact in EXACT if exact else ("loss", "tokens", "samples"):
            near = math.isclose(one[fact], other[fact], rel_tol=1e-5)
            if not (one[fact] == other[fact] if exact else near):
                raise Failure(f"metrics.jsonl: {fact} of step {one['step']} is {other[fact]!r}, not {one[fact]!r}")
