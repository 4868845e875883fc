"""How a job grows with its ranks: start, steps, save, resume, files, all on one machine with gloo.

    python scripts/bench/ranks.py [--ranks 1,2,4,8,16,32] [--steps 20] [--out FILE.json] [key=value ...]

A tiny encoder-decoder takes `steps` steps on n ranks under torchrun, saves, and goes on for one more step in a second
start. Printed for each n: seconds from the command to the first step, of the steps after it, from the last step to a
valid checkpoint, from the second command to its first step; files and bytes in the run directory without checkpoints,
the most resident memory of any rank, files of the checkpoint. Then for each of them e in ranks^e, fitted over all n,
and between the last two. Ranks share the cores, so time that each rank spends by itself makes e = 1 where there are
more ranks than cores; exit code 1 where files, bytes or memory grow faster than that, or a time by more than a tenth
faster. A rank takes 0.7 GB and more: see to it that there is room.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORDS = (
    *("experiment=quickstart", "tokenizer=byte", "tokenizer.vocab_size=260", "data.lanes=96", "data.block=8"),
    *("model.d_model=32", "model.num_heads=2", "model.d_ff=64", "model.encoder_layers=1", "model.decoder_layers=1"),
    *(
        "task.max_source_length=256",
        "task.max_target_length=256",
        "batch.global_size=96",
        "schedule=constant",
        "schedule.warmup=0",
    ),
    *("log.every=1", "eval.every=0", "eval.final_split=none", "checkpoint.every=0", "logging=[console]"),
    *("schedule=constant", "schedule.warmup=0", "name=run"),
)
TOLERATED = 1.1
"""The exponent that times may have: a fit of six noisy figures is not better."""


def measure(ranks: int, steps: int, words: Sequence[str]) -> dict[str, float]:
    """The figures of a job of so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        common = [*WORDS, f"runs_dir={folder}", *words]
        times = times_of_steps(ranks, [*common, f"steps={steps}"], folder)
        saved = (run / "checkpoints" / "latest").stat().st_mtime
        again = times_of_steps(ranks, [*common, f"steps={steps + 1}"], folder)
        assert set(times) - {0} == set(range(1, steps + 1)) and set(again) - {0} == {steps + 1}, (times, again)
        every = [path for path in run.rglob("*") if path.is_file()]
        others = [path for path in every if "checkpoints" not in path.parts]
        return {
            "start_seconds": times[1] - times[0],
            "steps_seconds": times[steps] - times[1],
            "save_seconds": saved - times[steps],
            "resume_seconds": again[steps + 1] - again[0],
            "files": len(others),
            "log_bytes": sum(path.stat().st_size for path in others),
            "peak_bytes": max(json.loads(line).get("memory_bytes", 0) for line in (run / "metrics.jsonl").open()),
            "checkpoint_files": len([path for path in every if f"step_{steps + 1:08d}" in path.parts]),
        }


def times_of_steps(ranks: int, words: Sequence[str], folder: str) -> dict[int, float]:
    """Unix times at which the console told each step; 0: when the command was given."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    times = {0: time.time()}
    with Path(folder, "errors").open("w+") as errors, subprocess.Popen(
        [*launch, "-m", "trainer", *words], cwd=folder, env={**os.environ, **environment},
        stdout=subprocess.PIPE, stderr=errors, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            told = line.split()
            if told[:1] == ["step"] and "/" in told[1]:
                times[int(told[1].partition("/")[0])] = time.time()
        if process.wait() != 0:
            errors.seek(0)
            raise SystemExit(f"{ranks} ranks ended with exit code {process.returncode}:\n{errors.read()[-4000:]}")
    return times


def exponent(ranks: Sequence[int], values: Iterable[float]) -> float:
    """The slope of the logarithms by least squares."""
    x, y = [math.log(n) for n in ranks], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,4,8,16,32")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("words", nargs="*", help="key=value")
    options = parser.parse_args()
    ranks = [int(number) for number in options.ranks.split(",")]
    figures = []
    for number in ranks:
        figures.append(measure(number, options.steps, options.words))
        told = "  ".join(f"{name} {value:,.2f}".removesuffix(".00") for name, value in figures[-1].items())
        print(f"ranks {number:>3}  {told}", flush=True)
    names = figures[0] if len(ranks) > 1 else ()
    growth = {name: exponent(ranks, (one[name] for one in figures)) for name in names}
    last = {name: exponent(ranks[-2:], (one[name] for one in figures[-2:])) for name in names}
    for name, fitted in growth.items():
        print(f"{name:<17} ranks^{fitted:.2f}, of late ranks^{last[name]:.2f}")
    if options.out is not None:
        facts = {"ranks": ranks, "figures": figures, "growth": growth, "last_growth": last}
        options.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return int(any(fitted > (TOLERATED if "seconds" in name else 1.0) for name, fitted in growth.items()))


if __name__ == "__main__":
    sys.exit(main())
