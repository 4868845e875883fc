"""Entrants as processes that can be let run and stopped in turns.

All entrants of a heat are started once; then each in turn runs for some seconds while the others are stopped (SIGSTOP),
so that the turns to be compared lie seconds apart, however long a start takes, and see the same noise of the machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from race import shardwright

HERE = Path(__file__).resolve().parent
PROGRAMS = {
    "hf_grouped": "hf",
    "accelerate": "accelerated",
    "lightning": "lightning_fit",
    "joeynmt": "joeynmt_train",
    "eole": "eole_train",
}
"""Entrants whose program has another name: one must not be called like the library it imports."""

ENTRANTS = ("shardwright", "bare", "hf", *PROGRAMS)


class Failed(Exception):
    """An entrant ended, or did not come as far as it should."""


@dataclass
class Runner:
    """One entrant's run of one lap. `cpus`: cores that it is bound to."""

    spec: dict[str, Any]
    python: str = sys.executable
    cpus: Sequence[int] = (0,)
    launched: float = 0.0
    events: list[dict[str, Any]] = field(default_factory=list)
    turns: list[tuple[int, int, float]] = field(default_factory=list)
    """Of each turn: its first and its last step, the seconds from the end of one to the end of the other."""
    processor_seconds: float = 0.0
    """That all its processes took in its turns."""
    _process: subprocess.Popen[bytes] | None = None
    _read: int = 0

    @property
    def out(self) -> Path:
        """Where the entrant writes."""
        return Path(self.spec["out"])

    def start(self) -> None:
        """Launch it."""
        self.out.mkdir(parents=True)
        self.launched = time.time()
        self._process = self._popen(self._command(), "log.txt")

    def _command(self) -> list[str]:
        path = self.out / "spec.json"
        path.write_text(json.dumps(self.spec, indent=1), encoding="utf-8")
        if self.spec["entrant"] == "shardwright":
            return shardwright.command(self.spec)
        ranks, name = self.spec["ranks"], self.spec["entrant"]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        return [*torchrun, str(HERE / f"{PROGRAMS.get(name, name)}.py"), str(path)]

    def _popen(self, words: Sequence[str], log: str) -> subprocess.Popen[bytes]:
        given = {
            "OMP_NUM_THREADS": str(self.spec["threads"]),
            "TOKENIZERS_PARALLELISM": "false",
            "DS_ACCELERATOR": "cpu",
        }
        environment = {**os.environ, **given}
        if self.spec["entrant"] in ("shardwright", "bare"):
            environment |= shardwright.environment()
        words = [sys.executable, "-c", _BOUND, ",".join(map(str, self.cpus)), self.python, *words]
        with (self.out / log).open("wb") as file:
            return subprocess.Popen(
                words, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def poll(self) -> None:
        """Take in what rank 0 has written since. Raises Failed where the process has ended."""
        path = self.out / "events_0.jsonl"
        if path.exists():
            with path.open("rb") as file:
                file.seek(self._read)
                for line in file:
                    if line.endswith(b"\n"):
                        self._read += len(line)
                        self.events.append(json.loads(line))
        assert self._process is not None, "it was started"
        if self._process.poll() is not None:
            tail = (self.out / "log.txt").read_text(encoding="utf-8", errors="replace")[-1500:]
            raise Failed(f"{self.spec['entrant']} ended with code {self._process.returncode}:\n{tail}")

    def steps(self) -> list[dict[str, Any]]:
        """Its steps so far, as rank 0 told them."""
        return [event for event in self.events if event["event"] == "step"]

    def until(self, steps: int, timeout: float = 300.0) -> None:
        """Wait until it has made so many steps. Raises Failed."""
        deadline = time.monotonic() + timeout
        while self.poll() or len(self.steps()) < steps:
            if time.monotonic() > deadline:
                raise Failed(f"{self.spec['entrant']} made {len(self.steps())} steps in {timeout:.0f} s, not {steps}")
            time.sleep(0.05)

    def turn(self, seconds: float, steps: int) -> None:
        """Let it run for so many seconds, and so many steps at least; note the turn."""
        before, begun, spent = len(self.steps()), time.monotonic(), self._processor_seconds()
        self.resume()
        while self.poll() or time.monotonic() - begun < seconds or len(self.steps()) < before + steps + 1:
            if time.monotonic() - begun > 40 * seconds + 60:
                raise Failed(f"{self.spec['entrant']} takes too long for {steps} steps")
            time.sleep(0.02)
        self.pause()
        self.processor_seconds += self._processor_seconds() - spent
        made = self.steps()[before:]
        self.turns.append((made[0]["step"], made[-1]["step"], made[-1]["time"] - made[0]["time"]))

    def processes(self) -> list[psutil.Process]:
        """All of this entrant, the launcher first."""
        assert self._process is not None, "it was started"
        root = psutil.Process(self._process.pid)
        return [root, *root.children(recursive=True)]

    def _processor_seconds(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self.processes())

    def pause(self) -> None:
        """Stop all its processes where they are."""
        for process in self.processes():
            process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        for process in reversed(self.processes()):
            process.send_signal(signal.SIGCONT)

    def peak_memory(self) -> int:
        """Bytes that the largest of its processes has held at most."""
        return max(_peak(process.pid) for process in self.processes())

    def end(self) -> None:
        """Kill it."""
        if self._process is not None and self._process.poll() is None:
            for process in self.processes():
                process.kill()
            self._process.wait()

    def everything(self) -> list[list[dict[str, Any]]]:
        """The events of every rank, after the end."""
        if self.spec["entrant"] == "shardwright":
            shardwright.note_checkpoints(self.spec)
        paths = sorted(self.out.glob("events_*.jsonl"))
        return [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in paths]

    def translate(self, checkpoint: str, texts: Path, output: Path, beams: int) -> None:
        """Write what the model of `checkpoint` makes of each line of `texts`. Raises Failed."""
        told = {"checkpoint": checkpoint, "input": str(texts), "output": str(output), "beams": beams}
        spec = {**self.spec, "translate": told, "ranks": 1}
        if spec["entrant"] == "shardwright":
            words = shardwright.translate_command(spec)
        else:
            path = output.with_suffix(".json")
            path.write_text(json.dumps(spec), encoding="utf-8")
            words = [str(HERE / f"{PROGRAMS.get(spec['entrant'], spec['entrant'])}.py"), str(path)]
        if self._popen(words, "translate.txt").wait() != 0:
            raise Failed(f"{spec['entrant']} did not translate: {(self.out / 'translate.txt').read_text()[-1500:]}")


_BOUND = """
import ctypes, os, sys
there = os.sched_getaffinity(0)
os.sched_setaffinity(0, there & {*map(int, sys.argv[1].split(","))} or there)
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: do not outlive the driver
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Bind to those of the cores that there are, then become the program."""


def _peak(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def make_spec(lap: Mapping[str, Any], entrant: str, out: Path, **told: Any) -> dict[str, Any]:
    """The whole SPEC.json: what the lap decides, and what the driver tells."""
    always = {"ranks": 1, "threads": 1, "engine": "plain", "seed": 0, "steps": 1_000_000}
    never = {"save_at": None, "save_every": 0, "validate_every": 0}
    return {**lap, **always, **never, "entrant": entrant, "out": str(out), **told}
