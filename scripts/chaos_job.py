"""A tiny training job that may be shot at: its data, its command line, its processes, and what it has told so far."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
PAIRS = ROOT / "trainer" / "data" / "corpora" / "homeassistant_en_de" / "train.jsonl.gz"
MARK = "SHARDWRIGHT_CHAOS"
"""In the environment of every process of a job, whoever started it: what is left over is found by it."""

STARTED = "run directory "
"""What a run tells once in each start, before its first step."""

DEADLINE_SECONDS = 500.0
STEPS = 40
LANES = 12

WORDS = (
    *("experiment=quickstart", "data=files", "tokenizer=byte", "tokenizer.vocab_size=260", "precision=fp32"),
    *("model.d_model=32", "model.num_heads=2", "model.d_ff=64", "model.encoder_layers=1", "model.decoder_layers=1"),
    *("task.max_source_length=200", "task.max_target_length=200", "batch.global_size=12", "schedule.warmup=5"),
    *("data.validation=null", "data.test=null", f"data.lanes={LANES}", "data.block=8", "data.trace=true"),
    *("data.retry_seconds=3", "log.every=1", "eval.every=0", "eval.final_split=none", f"steps={STEPS}"),
    *("checkpoint.every=3", "checkpoint.keep=3", "guard.start_seconds=400", "guard.step_seconds=30"),
)


class Failure(AssertionError):
    """A promise that the run did not keep."""


def write_data(folder: Path) -> None:
    """96 files of 8 to 16 short sentence pairs: a lane of the stream goes from file to file every few steps."""
    rng = random.Random(0)
    with gzip.open(PAIRS, "rt", encoding="utf-8") as lines:
        pairs = [pair for pair in map(json.loads, islice(lines, 6000)) if max(len(pair["en"]), len(pair["de"])) < 60]
    folder.mkdir(parents=True)
    for number in range(96):
        rows, pairs = pairs[: (size := rng.randint(8, 16))], pairs[size:]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"train-{number:02d}.jsonl").write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Shape:
    """How a start of the run is split. `workers`: processes of each rank that read; restarts: by the launcher."""

    engine: str
    ranks: int
    workers: int = 0
    restarts: int = 0


@dataclass
class Job:
    """One start of a run under torchrun. `run`: its directory; `log`: where its output goes, not on the run's disk."""

    run: Path
    log: Path
    shape: Shape
    words: Sequence[str]
    environment: Mapping[str, str]
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    first_step: int | None = None

    def start(self) -> Job:
        """Start it; `first_step` becomes the step it goes on from when it has told."""
        port = free_port()
        launch = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={self.shape.ranks}"),
            *("--master_addr=127.0.0.1", f"--master_port={port}", f"--max-restarts={self.shape.restarts}"),
            *("-m", "trainer", *WORDS, f"engine={self.shape.engine}", f"data.workers={self.shape.workers}"),
            *(f"runs_dir={self.run.parent}", f"name={self.run.name}", *self.words),
        ]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self.launcher = subprocess.Popen(
                launch, cwd=self.log.parent, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **hermetic(self.log.parent), **self.environment, MARK: self.mark},
            )  # fmt: skip
        self.started = time.monotonic()
        return self

    @property
    def told(self) -> str:
        """Everything that it has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def starts(self) -> int:
        """How often it has begun, restarts by the launcher included."""
        return self.told.count(STARTED)

    @property
    def step(self) -> int:
        """The last step that it has told; 0 before the first."""
        steps = re.findall(rf"^step +(\d+)/{STEPS} ", self.told, re.MULTILINE)
        if steps and self.first_step is None:
            self.first_step = int(steps[0]) - 1
        return int(steps[-1]) if steps else 0

    @property
    def alive(self) -> bool:
        """Whether the launcher runs."""
        return self.launcher.poll() is None

    @property
    def finished(self) -> bool:
        """Whether this start came to the run's end."""
        return not self.alive and self.launcher.returncode == 0

    def status(self) -> tuple[str | None, int | None, str]:
        """State, exit code and reason in status.json."""
        path = self.run / "status.json"
        told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return told.get("state"), told.get("exit_code"), told.get("reason", "")

    def wait_for(self, condition: Callable[[], bool], what: str) -> bool:
        """True once `condition` holds, False if the job ended before. Raises Failure after DEADLINE_SECONDS."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            if not self.alive:
                return condition()
            if time.monotonic() > deadline:
                raise Failure(f"waited {DEADLINE_SECONDS:g} s for {what}; at step {self.step}, {self.status()}")
            time.sleep(0.02)
        return True

    def wait_for_step(self, step: int) -> bool:
        """True once it has told a step from `step` on; see `wait_for`."""
        return self.wait_for(lambda: self.step >= step, f"step {step}")

    def wait_for_end(self) -> None:
        """Until the launcher is no more, and soon after it every process of the job. Raises Failure."""
        self.wait_for(lambda: not self.alive, "the end")
        deadline = time.monotonic() + 20.0
        while left := self.processes():
            if time.monotonic() > deadline:
                told = ", ".join(f"{process.pid} {process.name()}" for process in left)
                self.kill()
                raise Failure(f"orphans 20 s after the end of the launcher: {told}")
            time.sleep(0.05)

    def processes(self) -> list[psutil.Process]:
        """All living processes of the job: launcher, ranks, and what they have started."""
        return [process for process in psutil.process_iter() if environment_of(process).get(MARK) == self.mark]

    def ranks(self) -> list[psutil.Process]:
        """The trainer processes, by rank; those below them (data workers, W&B's service) are none."""
        found = {p.pid: p for p in self.processes() if "RANK" in environment_of(p)}
        tops = [p for p in found.values() if parent_of(p) not in found]
        return sorted(tops, key=lambda process: int(environment_of(process).get("RANK", "0")))

    def kill(self) -> None:
        """SIGKILL for all of it."""
        while processes := self.processes():
            for process in processes:
                send(process, signal.SIGKILL)
            time.sleep(0.02)
        self.launcher.wait()


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Send a signal to a process that may have gone."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def environment_of(process: psutil.Process) -> dict[str, str]:
    """Its environment; {} for one that has gone, or that the kernel keeps to itself."""
    try:
        return {} if process.status() == psutil.STATUS_ZOMBIE else process.environ()
    except (psutil.Error, OSError):
        return {}


def parent_of(process: psutil.Process) -> int | None:
    """The id of its parent, if it is still there."""
    try:
        return process.ppid()
    except psutil.Error:
        return None


def hermetic(folder: Path) -> dict[str, str]:
    """The environment of a job: one thread a rank, no network but the loopback, temporary files in `folder`."""
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": python_path,
        "TMPDIR": str(folder),
    }


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[bool]:
    """`folder` as a disk of its own, in memory; yields False where mounting is not permitted, and it is a plain one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "chaos", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
