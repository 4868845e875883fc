"""Stands for `python -m trainer` in jobs whose signals are tested: listens as the trainer does, and says what came.

Its folder goes before the trainer's on PYTHONPATH, as a package of that name. The first start waits for a signal and
ends as a preempted run does; the next one finishes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(os.environ["REAL_TRAINER"], f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


folder = Path(next(word.partition("=")[2] for word in sys.argv if word.startswith("--config-path=")))
os.environ.update(load("srun").ranks_from_srun(os.environ))
rank, run = os.environ["RANK"], folder.parent


def say(*words: object) -> None:
    with (run / f"said_{rank}").open("a") as file:
        print(*words, file=file)


def conclude(state: str, code: int) -> None:
    if rank == "0":
        (run / "status.json").write_text(json.dumps({"state": state, "step": 1, "exit_code": code}, indent=1))


signals = load("guards/signals")
again = (run / f"said_{rank}").exists()
if os.environ.get("FAILS"):
    say("fails")
    sys.exit(76)
with signals.listening() as request:
    say("starts", os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"], os.environ["MASTER_ADDR"])
    deadline = time.monotonic() + 60
    while not again and request.name is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if again or request.name is None:
        say("finishes")
        conclude("finished", 0)
        sys.exit(0)
    say("saves", request.name)
    time.sleep(float(os.environ.get("SAVES_FOR", "1")))  # what is told of the signal by others comes in this time
    say("saved")
    conclude("preempted", 75)
    sys.exit(75)
