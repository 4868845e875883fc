"""How cost grows: a table for each of the sizes that a user may choose, with fitted exponents.

    python scripts/bench/growth.py NAME... [--at 512,2048,8192] [--steps 5] [--out FILE.json]

ranks        1 to 16 ranks on this machine (`scripts/bench/ranks.py`): start, steps, save, resume, files, memory
lanes        1 to 4,096 lanes in 4,096 shards: first batch, steps of the loader, state, memory
shards       100 to 10,000 shards: first batch, steps of the loader, memory
length       packed rows of 512 to 32,768 tokens, one a step: a decoder's step, the trainer's part of it, memory
parameters   decoders of 1 M to 300 M parameters (--at 1000 goes to 1 B, for which 24 GB are too few with other work):
             start, step, the trainer's part of it, save, load, memory
run          1,000 to 1,000,000 logged steps: metrics.jsonl and CSV, resuming, the report, launch.status, the live
             view, W&B off-line (to 10,000)

Every size is measured in a process of its own with one thread. Seconds of a step are medians, by a clock that stands
while others run on this process's processor (`overhead.own_seconds`), those of the loader the processor's; memory is
the peak above what the imports take. "e" is the exponent in figure ~ size^e by least squares of the logarithms over all
sizes, "of late" between the last two: a constant part hides growth from the first and not from the second.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ranks import exponent
from ranks import measure as measure_ranks

Figures = dict[str, float]

SIZES: dict[str, Sequence[int]] = {
    "ranks": (1, 2, 4, 8, 16),
    "lanes": (1, 16, 64, 256, 1024, 4096),
    "shards": (100, 1000, 10_000),
    "length": (512, 2048, 8192, 32_768),
    "parameters": (1, 3, 10, 30, 100, 300),
    "run": (1000, 10_000, 100_000, 1_000_000),
}
LOGGED = 10_000
"""Steps of a long run that are really logged, and timed."""

MB, MS = 1e-6, 1e3
DECODERS = {1: (96, 4), 3: (192, 6), 10: (320, 8), 30: (512, 9), 100: (768, 14), 300: (1152, 19), 1000: (2048, 20)}
"""Width and layers by millions of parameters, beside 2,048 token vectors."""

DECODER = (
    *("experiment=lm_small", "logging=[]", "eval.every=0", "eval.final_split=none", "checkpoint.every=0"),
    *("log.every=1", "name=bench", "schedule.warmup=0", "batch.global_size=1"),
    *("tokenizer=bpe", "tokenizer.vocab_size=2048"),
)


def measure_lanes(lanes: int, folder: Path, options: argparse.Namespace) -> Figures:
    """A stream of so many lanes: every lane has finished some blocks when the steps are timed."""
    from data import short_records, write_shards

    block, shards = 8, write_shards(folder / "shards", short_records(4096 * 40), 4096, 40)
    return stream_figures(shards, max(100, lanes * block // 24), lanes=lanes, block=block)


def measure_shards(shards: int, folder: Path, options: argparse.Namespace) -> Figures:
    """A stream of so many shards of 20 records, 48 lanes."""
    from data import short_records, write_shards

    return stream_figures(write_shards(folder / "shards", short_records(shards * 20), shards, 20), 200, block=8)


def stream_figures(shards: Path, warm_up: int, **settings: Any) -> Figures:
    """From nothing to the first step, the steps after `warm_up`, and the state that a checkpoint has; seconds of the
    processor, for the loader reads ahead in threads of its own."""
    from data import Pass, make_loader
    from trainer import garbage
    from trainer.data.stream import StreamData

    with above() as memory:
        begun = time.process_time()
        loader = make_loader(StreamData(str(shards), **settings), Pass(), None)
        assert loader._step().num_samples == 48
        opened = time.process_time() - begun
        for _ in range(warm_up):
            loader._step()
        begun = time.process_time()
        with garbage.collected_between_steps():
            for _ in range(200):
                states = loader._step().lane_states
        stepping = time.process_time() - begun
        loader.close()
    begun = time.process_time()
    text = json.dumps(states)
    return {
        "first step of the loader, s": opened,
        "a step, ms": stepping / 200 * MS,
        "state in a checkpoint, bytes": len(text),
        "to write the state, ms": (time.process_time() - begun) * MS,
        "memory, MB": memory() * MB,
    }


def measure_length(length: int, folder: Path, options: argparse.Namespace) -> Figures:
    """A decoder of 4 layers on one packed row of so many tokens a step."""
    words = (f"task.sequence_length={length}", f"model.max_positions={length}", "data.lanes=1")
    found = run_figures([*DECODER, *words], folder, options.steps)
    return {name: value for name, value in found.items() if not name.startswith(("save", "load", "start"))}


def measure_parameters(millions: int, folder: Path, options: argparse.Namespace) -> Figures:
    """A decoder of so many million parameters on one packed row of 256 tokens a step."""
    width, layers = DECODERS[millions]
    shape = (f"model.d_model={width}", f"model.num_layers={layers}", f"model.d_ff={8 * width // 3 // 8 * 8}")
    heads = (f"model.num_heads={width // 32}", f"model.num_kv_heads={width // 32}")
    words = ("task.sequence_length=256", "model.max_positions=256")
    return run_figures([*DECODER, *shape, *heads, *words], folder, options.steps)


def run_figures(words: Sequence[str], folder: Path, steps: int) -> Figures:
    """A run of a few steps, as `trainer.main` does it: its start, the sections of its steps, save and load."""
    from overhead import own_seconds

    from trainer import garbage, sections
    from trainer.checkpoint.load import load, newest
    from trainer.composition import compose
    from trainer.config import to_config
    from trainer.guards.signals import StopRequest
    from trainer.host import keep_freed_memory
    from trainer.loop import fit
    from trainer.main import assemble

    keep_freed_memory()
    clock = Sections(own_seconds)
    config = to_config(compose([*words, f"steps={steps + 2}", f"runs_dir={folder}"]))
    with above() as memory:
        begun = own_seconds()
        training, state, lanes = assemble(config, [], StopRequest(), lambda path: None)
        started = own_seconds() - begun
        with garbage.collected_between_steps(), sections.told_to(clock):
            fit(training, state, lanes)
            clock("end", None)
        training.loader.close()
        training.sinks.close("finished")
        training.quarantine.close()
        begun = own_seconds()
        checkpoint = newest(training.directory.checkpoints)
        assert checkpoint is not None
        load(checkpoint, training.engine)
        loaded = own_seconds() - begun
    model = ("forward", "backward", "reduce", "optimizer")
    each = [clock.steps[step] for step in range(3, steps + 3)]  # the first two warm up
    whole = statistics.median(sum(step.values()) for step in each)
    ours = statistics.median(sum(value for name, value in step.items() if name not in model) for step in each)
    return {
        "start, s": started,
        "a step, ms": whole * MS,
        "the trainer's part of it, ms": ours * MS,
        "the trainer's part of it, %": 100 * ours / whole,
        "save, s": clock.saving,
        "load, s": loaded,
        "memory, MB": memory() * MB,
    }


class Sections:
    """Hears of the sections of steps (`trainer.sections`): the seconds of each by step."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._name, self._step, self._since = clock, "", 0, clock()
        self.steps: defaultdict[int, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.saving = 0.0
        """Seconds from the beginning of a save to what came next: of the last, a valid checkpoint."""

    def __call__(self, name: str, step: int | None) -> None:
        seconds = self._clock() - self._since
        if self._name == "save":
            self.saving += seconds
        elif self._name:
            self.steps[self._step][self._name] += seconds
        self._name, self._step, self._since = name, step or self._step, self._clock()


def measure_run(steps: int, folder: Path, options: argparse.Namespace) -> Figures:
    """So many logged steps: what writes, reads and shows them."""
    from trainer.metrics import RunInfo
    from trainer.metrics.console import ConsoleSink
    from trainer.metrics.csv import CsvSink
    from trainer.metrics.sinks import JsonLinesSink

    directory = folder / "run"
    directory.mkdir()
    (directory / "config.yaml").write_text(f"name: run\nsteps: {steps}\n", encoding="utf-8")
    run, resumed = (RunInfo("run", directory, {}, {}, steps, first) for first in (0, steps - 5))
    found: Figures = {}
    for name, sink in (("metrics.jsonl", JsonLinesSink()), ("metrics.csv", CsvSink())):
        sink.open(run)
        found |= {f"{name}, {figure}": value for figure, value in written(sink, directory / name, steps).items()}
        sink.close("failed")
        seconds, grown = taken(lambda sink=sink: sink.open(resumed))
        sink.close("failed")
        found[f"{name}, to resume, ms"], found[f"{name}, to resume, MB"] = seconds * MS, grown * MB
    with Path(os.devnull).open("w") as screen:
        view = ConsoleSink(mode="live", stream=screen)
        view.open(run)
        seconds, grown = taken(lambda: log_all(view, steps))
        view.close("finished")
    found |= {"live view, a step, µs": seconds / steps * 1e6, "live view, MB": grown * MB}
    return found | reading_figures(directory) | (wandb_figures(run, steps) if steps <= 10_000 else {})


def written(sink: Any, path: Path, steps: int) -> Figures:
    """A file of so many logged steps: the last of them logged, those before the first ones with other numbers."""
    first = max(0, steps - LOGGED)
    if first > 0:
        log_all(sink, LOGGED)
        lines = path.read_bytes().splitlines(keepends=True)[-LOGGED:]
        with path.open("ab") as file:
            for begin in range(LOGGED, first, LOGGED):
                file.writelines(line.replace(b"%d" % n, b"%d" % (begin + n), 1) for n, line in enumerate(lines, 1))
    before = path.stat().st_size if path.exists() else 0
    seconds, _ = taken(lambda: log_all(sink, steps, first))
    logged = steps - first
    return {"bytes a step": (path.stat().st_size - before) / logged, "a step, µs": seconds / logged * 1e6}


def reading_figures(directory: Path) -> Figures:
    """What `trainer.report` and `launch.status` take of a run."""
    from launch.runs import state_of
    from trainer.report.history import read_history
    from trainer.report.page import render
    from trainer.run_directory import RunDirectory

    short = directory.with_name("short")
    short.mkdir()
    (short / "config.yaml").write_text("name: short\n", encoding="utf-8")
    with (directory / "metrics.jsonl").open("rb") as lines:
        (short / "metrics.jsonl").write_bytes(b"".join(islice(lines, 10)))
    render([read_history(RunDirectory(short))])  # imports
    seconds, grown = taken(lambda: render([read_history(RunDirectory(directory))]))
    stood, _ = taken(lambda: state_of(directory, "run"))
    return {"report, s": seconds, "report, MB": grown * MB, "launch.status, ms": stood * MS}


def wandb_figures(run: Any, steps: int) -> Figures:
    """What W&B keeps of a run off-line."""
    from trainer.metrics.wandb import WandbSink

    sink = WandbSink(mode="offline")
    sink.open(run)
    seconds, _ = taken(lambda: log_all(sink, steps))
    sink.close("finished")
    kept = sum(path.stat().st_size for path in (run.directory / "wandb").rglob("*.wandb"))
    return {"W&B off-line, bytes a step": kept / steps, "W&B off-line, a step, µs": seconds / steps * 1e6}


def log_all(sink: Any, steps: int, after: int = 0) -> None:
    """Steps as a run logs them, with as many digits as real ones have."""
    from trainer.metrics import StepInfo

    for step in range(after + 1, steps + 1):
        loss = 2.0 + math.sin(step) / 7
        info = StepInfo(
            step=step, tokens=3017 * step, samples=192 * step, epoch=round(step / 61, 4), loss=loss,
            grad_norm=loss / 9, lr=loss * 1e-4, step_seconds=loss / 17, tokens_per_second=loss * 9871,
            target_tokens=3017, padding_fraction=loss / 91, loader_wait_seconds=loss / 30011, mfu=None,
            memory_bytes=1_103_000_000, skipped_steps=0, data={"bad_record": 2},
        )  # fmt: skip
        sink.log(info)


def taken(action: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and bytes of memory at the peak above what there was."""
    from overhead import own_seconds

    with above() as memory:
        begun = own_seconds()
        action()
        seconds = own_seconds() - begun
    return seconds, memory()


@contextmanager
def above() -> Iterator[Callable[[], int]]:
    """What tells, inside or afterwards, the peak of resident memory since it began above what there was then."""
    from sharding import forget_peak, resident_bytes

    gc.collect()
    forget_peak()
    begun = resident_bytes("VmRSS")
    peak: list[int] = []
    yield lambda: (peak or [resident_bytes("VmHWM")])[0] - begun
    peak.append(resident_bytes("VmHWM"))


def in_own_process(name: str, size: int, steps: int) -> Figures:
    """The figures of one size."""
    if name == "ranks":
        return measure_ranks(size, steps, ())
    command = [sys.executable, __file__, name, "--child", str(size), "--steps", str(steps)]
    one_thread = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env={**os.environ, **one_thread}, text=True, capture_output=True)
    if done.returncode != 0:
        raise SystemExit(f"{name} {size} ended with exit code {done.returncode}:\n{done.stderr[-4000:]}")
    result: Figures = json.loads(done.stdout.splitlines()[-1])
    return result


def table(name: str, sizes: Sequence[int], figures: Sequence[Figures]) -> str:
    """Markdown: a row a figure, a column a size, then the exponents."""
    lines = [
        f"| {name} | {' | '.join(f'{size:,}' for size in sizes)} | e | of late |",
        "|---" * (len(sizes) + 3) + "|",
    ]
    for figure in dict.fromkeys(key for one in figures for key in one):
        values = [one.get(figure) for one in figures]
        known = [(size, value) for size, value in zip(sizes, values, strict=True) if value is not None and value > 0]
        fitted = [told_exponent(known), told_exponent(known[-2:])]
        lines.append(f"| {figure} | {' | '.join([*map(told, values), *fitted])} |")
    return "\n".join(lines)


def told_exponent(known: Sequence[tuple[int, float]]) -> str:
    """The fitted one, where there is anything to fit."""
    return f"{exponent(*zip(*known, strict=True)):.2f}" if len(known) > 1 else ""


def told(value: float | None) -> str:
    """Three digits, and whole numbers from a thousand on."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def main() -> None:
    """Measure and print; or, as a child, one size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=SIZES)
    parser.add_argument("--at", help="sizes, where they are not to be the usual ones")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        with tempfile.TemporaryDirectory() as folder:
            found = globals()[f"measure_{options.names[0]}"](options.child, Path(folder), options)
        print(json.dumps(found))
        return
    every = {}
    for name in options.names:
        sizes = [int(size) for size in options.at.split(",")] if options.at else SIZES[name]
        figures = [in_own_process(name, size, options.steps) for size in sizes]
        every[name] = dict(zip(sizes, figures, strict=True))
        print(table(name, sizes, figures), end="\n\n", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
