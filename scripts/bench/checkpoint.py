"""What a save costs training: steps with a save in flight beside steps without, and its stall beside a blocking save.

    python scripts/bench/checkpoint.py [--pairs 7] [--steps 12] [key=value ...]

One process trains the model of `experiment=translation_base` (12.5 M parameters, 150 MB of state in fp32) on the data
of the quick start unless told otherwise. A pair is `steps` steps with a save begun at the first, and as many without.
Printed: medians and ranges of the ratio of their times, and of the stall (seconds in the call of `save`) to a save that
blocks.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from trainer.checkpoint.save import Checkpointer
from trainer.composition import compose
from trainer.config import CheckpointConfig, to_config
from trainer.guards.signals import StopRequest
from trainer.loop import on_device
from trainer.main import assemble
from trainer.state import TrainState

WORDS = [
    "experiment=translation_base", "data.path=corpora:homeassistant_en_de", "tokenizer.max_records=5000",
    "batch.global_size=64", "batch.micro_tokens=null", "logging=[]", "eval.final_split=none", "eval.every=0",
    "name=bench",
]  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        config = to_config(compose([*WORDS, f"runs_dir={folder}", *options.words]))
        training, _, _ = assemble(config, [], StopRequest(), lambda path: None)
        engine, task = training.engine, training.task
        lanes = next(iter(training.loader)).lane_states
        training.loader.close()
        batch = on_device(task.collate([training.corpus.first_sample()] * 64))
        root = Path(folder) / "checkpoints"
        policy = CheckpointConfig(keep=1)
        background = Checkpointer(root, engine, {}, policy, lambda *_: None)
        blocking = Checkpointer(root, engine, {}, replace(policy, asynchronous=False), lambda *_: None)

        def steps(count: int) -> float:
            started = time.perf_counter()
            for _ in range(count):
                engine.forward_backward(task, batch, 1.0 / 1000, True)
                background.settle()
                engine.step(1e-4)
            return time.perf_counter() - started

        def save(checkpointer: Checkpointer, step: int) -> float:
            started = time.perf_counter()
            checkpointer.save(TrainState(step=step), lanes)
            return time.perf_counter() - started

        ratios, stalls, stall_seconds, numbers = [], [], [], itertools.count(1)
        for pair in range(options.pairs + 1):
            without = steps(options.steps)
            stall = save(background, next(numbers))
            with_save, in_flight = steps(options.steps), not background.written
            background.require()
            blocked = save(blocking, next(numbers))
            if pair:
                ratios.append(with_save / without)
                stalls.append(stall / blocked)
                stall_seconds.append((stall, blocked, in_flight))
    told = ", ".join(f"{stall:.3f} of {blocked:.2f} s" for stall, blocked, _ in stall_seconds)
    print(f"steps with a save in flight / without: {told_range(ratios)}")
    print(f"stall / blocking save: {told_range(stalls)}: {told}")
    print(f"still writing after the last step: {sum(flight for *_, flight in stall_seconds)} of {options.pairs}")


def told_range(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
