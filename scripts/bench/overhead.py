"""What the trainer costs on top of a bare PyTorch loop: the same model, batches, precision and optimizer, in one
process.

    python scripts/bench/overhead.py [--pairs 7] [--steps 20] [--threads 2] [key=value ...]

Both sides take the same steps in turn (A B A B ...), on the quick start's model and data unless told otherwise. The
trainer's side is the real `fit`: loader, agreement, engine, meter, metrics.jsonl. The bare side gets its batches
ready-made and does forward, backward, clipping, update. Printed: the median and range of bare seconds / trainer
seconds; 1 means no overhead.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainer.build import build
from trainer.composition import compose
from trainer.config import to_config
from trainer.data.corpus import Stream
from trainer.data.dealers import make_dealers
from trainer.data.loader import Loader
from trainer.guards.signals import StopRequest
from trainer.loop import fit
from trainer.main import assemble
from trainer.optim import build_optimizer


class StepTimes:
    """A sink that notes when each step was logged."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def log(self, info: Any) -> None:
        self.times.append(time.perf_counter())

    def event(self, step: int, message: str) -> None: ...


class BareLoop:
    """What a careful user writes by hand. bf16: parameters in bf16 and fp32 masters, like the trainer's."""

    def __init__(self, training: Any, build_model: Any, dtype: torch.dtype) -> None:
        self.model = build_model()
        self.model.reset_parameters(torch.Generator().manual_seed(0))
        self.masters = {name: torch.nn.Parameter(p.detach().float()) for name, p in self.model.named_parameters()}
        self.model.to(dtype)
        if dtype == torch.float32:
            self.masters = dict(self.model.named_parameters())
        self.optimizer = build_optimizer(training.config.optimizer, self.masters.items())
        self.task, self.dtype, self.clip = training.task, dtype, training.config.clip_norm

    def run(self, batches: list[Any]) -> float:
        started = time.perf_counter()
        for batch in batches:
            tokens = sum(int((b["labels"] != -100).sum()) for b in batch)
            for micro_batch in batch:
                (self.task.loss(self.model, micro_batch).objective / tokens).backward()
            if self.dtype != torch.float32:
                for name, parameter in self.model.named_parameters():
                    self.masters[name].grad = parameter.grad.float()
                    parameter.grad = None
            torch.nn.utils.clip_grad_norm_(self.masters.values(), self.clip, foreach=True)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.dtype != torch.float32:
                with torch.no_grad():
                    for name, parameter in self.model.named_parameters():
                        parameter.copy_(self.masters[name])
        return time.perf_counter() - started


def measure(words: list[str], pairs: int, steps: int) -> list[float]:
    """Ratios bare / trainer, one a pair; `steps` optimizer steps on each side."""
    with tempfile.TemporaryDirectory() as folder:
        common = [
            "experiment=quickstart",
            "logging=[]",
            "eval.every=0",
            "checkpoint.every=0",
            "log.every=1",
            "steps=1000000",
        ]
        config = to_config(compose([*common, *words, f"runs_dir={folder}", "name=bench"]))
        training, state, lanes = assemble(config, [], StopRequest(), lambda path: None)
        dtype = next(training.engine.module.parameters()).dtype
        bare = BareLoop(training, lambda: build(config.model, "model"), dtype)
        loader = iter(training.loader)
        stream = Stream(training.corpus, config.seed, config.batch.global_size)
        same = iter(Loader(make_dealers(stream, 0, 1), training.task, training.plan))
        ratios = []
        for pair in range(pairs + 1):
            batches = [next(same).micro_batches for _ in range(steps + 1)][1:]
            bare.run(batches)  # whoever meets a shape of tensors first pays for its kernel
            seconds = {}
            for side in ("bare", "trainer") if pair % 2 else ("trainer", "bare"):
                if side == "bare":
                    seconds[side] = bare.run(batches)
                    continue
                sink = StepTimes()
                until = replace(config, steps=state.step + steps + 1)
                state, _ = fit(replace(training, config=until, loader=loader, sinks=sink), state, lanes)
                seconds[side] = sink.times[-1] - sink.times[0]
            if pair:  # the first warms up
                ratios.append(seconds["bare"] / seconds["trainer"])
        training.loader.close()
        assert Path(folder, "bench", "metrics.jsonl").exists()
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("words", nargs="*", help="overrides, key=value")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"threads {arguments.threads}, pairs {arguments.pairs}, steps {arguments.steps}, {' '.join(arguments.words)}")
    for precision in ("fp32", "bf16"):
        ratios = measure([f"precision={precision}", *arguments.words], arguments.pairs, arguments.steps)
        print(
            f"{precision}: bare / trainer seconds a step: median {statistics.median(ratios):.3f}"
            f" (range {min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
