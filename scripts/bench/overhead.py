"""What the trainer costs on top of a bare PyTorch loop: the same model, batches, precision and optimizer, in one
process.

    python scripts/bench/overhead.py [--pairs 40] [--threads 2] [--at-least 0.95] [key=value ...]

Both sides take steps in turn on the same batches, trainer, bare, bare, trainer: of two batches each side meets one
first, and whatever else the machine does falls on both. That is a pair; its ratio is bare seconds / trainer seconds, 1
means no overhead. The trainer's side is the real `fit` from the end of one step's line in metrics.jsonl to the end of
the next: loader, agreement, engine, meter, the line. The bare side gets its batches ready-made and does forward,
backward, clipping, update. It is the quick start's model and data unless told otherwise, in fp32 and bf16. Seconds are
those of the clock less the time for which the kernel let others run though this thread could have: beside other work
the ratio varies, and its median stays, while waiting for a loader, a disk or another thread still counts.

--at-least makes it a gate: exit code 1 where the median of a precision is below, in a second measurement with
three times as many pairs too.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
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
from trainer.metrics import StepInfo
from trainer.metrics.sinks import SafeSinks
from trainer.optim import build_optimizer

WARM_UP = 2
"""Pairs before those that count."""

AGAIN = 3
"""Times as many pairs, where a gate measures a second time."""

SCHEDULED = Path("/proc/thread-self/schedstat")
"""Nanoseconds on a processor, and in wait for one (Linux, Documentation/scheduler/sched-stats.rst)."""


def own_seconds() -> float:
    """A clock that stands while others run on the processor that this thread waits for; where the kernel does not tell,
    it is the usual one."""
    waited = int(SCHEDULED.read_text().split()[1]) * 1e-9 if SCHEDULED.exists() else 0.0
    return time.perf_counter() - waited


class InTurn:
    """In the place of the run's sinks: after the step's line is written, the bare loop has its turn."""

    def __init__(self, sinks: SafeSinks, bare: BareLoop, batches: Sequence[list[Any]]) -> None:
        """batches: those that the trainer gets."""
        self._sinks, self._bare, self._batches = sinks, bare, batches
        self._begun = own_seconds()
        self._taken = 0
        self._trainer: list[float] = []
        self._own: list[float] = []

    def log(self, info: StepInfo) -> None:
        """The trainer, every time; the bare loop after the first of two steps, for both."""
        self._sinks.log(info)
        self._trainer.append(own_seconds() - self._begun)
        if self._taken % 2 == 0:
            self._own += [self._bare.step(batch) for batch in self._batches[self._taken : self._taken + 2]]
        self._taken += 1
        self._begun = own_seconds()

    def event(self, step: int, message: str) -> None:
        """Nothing happens that matters here."""

    def ratios(self) -> list[float]:
        """Bare / trainer of every pair that counts."""
        steps = zip(self._own, self._trainer, strict=True)
        pairs = zip(steps, steps, strict=True)  # both from one iterator: neighbours
        return [(own + own_2) / (ours + ours_2) for (own, ours), (own_2, ours_2) in pairs][WARM_UP:]


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

    def step(self, batch: list[Any]) -> float:
        """Seconds of a step."""
        started = own_seconds()
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
        return own_seconds() - started


def measure(words: Sequence[str], pairs: int) -> list[float]:
    """The ratio bare / trainer of each pair; words: overrides."""
    common = (
        "experiment=quickstart",
        "logging=[]",
        "eval.every=0",
        "checkpoint.every=0",
        "log.every=1",
        "log.norms=none",  # by default of every tenth step alone
        "steps=1000000",
    )
    steps = 2 * (WARM_UP + pairs)
    with tempfile.TemporaryDirectory() as folder:
        config = to_config(compose([*common, *words, f"runs_dir={folder}", "name=bench"]))
        training, state, lanes = assemble(config, [], StopRequest(), lambda path: None)
        dtype = next(training.engine.module.parameters()).dtype
        bare = BareLoop(training, lambda: build(config.model, "model"), dtype)
        stream = Stream(training.corpus, config.seed, config.batch.global_size)
        same = Loader(make_dealers(stream, 0, 1), training.task, training.plan)
        batches = [step.micro_batches for step in itertools.islice(same, steps)]
        same.close()
        turns = InTurn(training.sinks, bare, batches)
        fit(replace(training, sinks=turns, config=replace(config, steps=steps)), state, lanes)
        training.loader.close()
        training.sinks.close("finished")
        training.quarantine.close()
    return turns.ratios()


def told(ratios: Sequence[float]) -> str:
    """Median, quartiles and range."""
    low, _, high = statistics.quantiles(ratios, n=4)
    return (
        f"median {statistics.median(ratios):.3f} of {len(ratios)} pairs"
        f" (half of them {low:.3f} to {high:.3f}, all {min(ratios):.3f} to {max(ratios):.3f})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--at-least", type=float, default=0.0, help="the median below which it fails")
    parser.add_argument("words", nargs="*", help="overrides, key=value")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print(f"threads {options.threads} {' '.join(options.words)}")
    passed = True
    for precision in ("fp32", "bf16"):
        for pairs in (options.pairs, AGAIN * options.pairs):
            ratios = measure([f"precision={precision}", *options.words], pairs)
            print(f"{precision}: bare / trainer seconds a step: {told(ratios)}", flush=True)
            if enough := statistics.median(ratios) >= options.at_least:
                break
        passed = passed and enough
    if not passed:
        print(f"the trainer costs too much: the median is below {options.at_least:g}", file=sys.stderr)
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
