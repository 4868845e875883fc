"""What is done to a job, and what the job must make of it: a function for each kind of fault."""

from __future__ import annotations

import random
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from chaos_job import STARTED, STEPS, Failure, Job, send

from tests.data.servers import Fault, FaultyServer

HANGS, PREEMPTED, REFUSED = 76, 75, 2


@dataclass
class Target:
    """A job in the sights. `disk`: the root of the run's own small disk, None where there is none; `start`: begins
    another job of the run; `damaged`: the name of the checkpoint that the next one must not take."""

    job: Job
    rng: random.Random
    server: FaultyServer
    disk: Path | None
    start: Callable[[], Job]
    damaged: str | None = None

    @property
    def trains(self) -> bool:
        """Whether this start has told a step, so that its ranks listen to signals and know each other."""
        return self.job.step > 0

    def expect(self, state: str, exit_code: int, reason: str) -> None:
        """How status.json must read after the end, unless the run had not begun or came to its last step. Raises
        Failure."""
        self.job.wait_for_end()
        told = self.job.status()
        if self.trains and told[0] != "finished" and (told[:2] != (state, exit_code) or reason not in told[2]):
            raise Failure(f"expected {state} {exit_code} ({reason!r}), status.json says {told}")

    def goes_on(self, steps: int = 2) -> None:
        """The job must train on by itself. Raises Failure."""
        before = self.job.step
        self.job.wait_for_step(before + steps)
        if not self.job.alive and not self.job.finished:
            raise Failure(f"the job ended at step {self.job.step} instead of going on: {self.job.status()}")


def kill_rank(target: Target) -> None:
    """SIGKILL for one rank; where the launcher may restart, the job goes on by itself."""
    job = target.job
    if not (ranks := job.ranks()):
        return
    starts = job.starts
    send(target.rng.choice(ranks), signal.SIGKILL)
    if not job.shape.restarts:
        return target.expect("failed", HANGS, "lost a peer") if len(ranks) > 1 else job.wait_for_end()
    job.wait_for(lambda: job.starts > starts and "\nstep " in job.told.rpartition(STARTED)[2], "a step after a restart")
    if not job.alive and not job.finished:
        raise Failure(f"the launcher did not start the job again: {job.status()}")


def kill_all(target: Target) -> None:
    """SIGKILL for every process at once."""
    target.job.kill()


def kill_launcher(target: Target) -> None:
    """SIGKILL for the launcher alone: its ranks must not train on behind everybody's back."""
    target.job.launcher.kill()
    target.expect("failed", HANGS, "the launcher")


def term_launcher(target: Target) -> None:
    """SIGTERM to the launcher, as a scheduler does."""
    target.job.launcher.send_signal(signal.SIGTERM)
    target.expect("preempted", PREEMPTED, "a signal")


def term_rank(target: Target) -> None:
    """SIGTERM to one rank: all of them save and stop."""
    if ranks := target.job.ranks():
        send(target.rng.choice(ranks), signal.SIGTERM)
        target.expect("preempted", PREEMPTED, "a signal")


def stop_rank(target: Target) -> None:
    """SIGSTOP for one rank: the others end the job when its time is up."""
    job = target.job
    if len(ranks := job.ranks()) < 2:
        return kill_all(target)
    victim = target.rng.choice(ranks)
    send(victim, signal.SIGSTOP)
    try:
        job.wait_for(lambda: "error: hang: " in job.told, "the watchdog")
    finally:
        send(victim, signal.SIGKILL)  # the launcher would wait 30 s for it
    target.expect("failed", HANGS, "hang: ")


def fill_disk(target: Target) -> None:
    """No room for some steps and at least one checkpoint; then there is room again, and the job goes on. If its last
    step comes before, it ends with an error, for its last checkpoint is missing."""
    with full(target.disk):
        target.job.wait_for_step(target.job.step + 5)
    if target.job.step < STEPS:
        target.goes_on()
    else:
        target.expect("failed", 2, "No space left on device")


def start_on_full_disk(target: Target) -> None:
    """Not a byte of room when a job begins: it is refused, and what is there stays whole."""
    target.job.kill()
    with full(target.disk):
        job = target.start()
        try:
            job.wait_for_end()
        finally:
            job.kill()
        if job.launcher.returncode == 0 or "error: runs_dir=" not in job.told or "No space left on" not in job.told:
            raise Failure(f"on a full disk the start was not refused as it should be:\n{job.told[-2000:]}")


@contextmanager
def full(disk: Path | None) -> Iterator[None]:
    """Inside, there is not a byte of room on the disk."""
    assert disk is not None, "there is no disk to fill"
    filler = disk / "filler"
    try:
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 20)):  # the last one in part
                pass
        yield
    finally:
        filler.unlink()


def damage(target: Target) -> None:
    """The newest checkpoint is cut short, garbled, or loses a file while nothing runs; an older one must be left."""
    target.job.kill()
    folders = sorted((target.job.run / "checkpoints").glob("step_*"))
    if len(folders) < 2:
        return
    path = target.rng.choice(sorted(folders[-1].iterdir()))
    content = bytearray(path.read_bytes())
    how = target.rng.choice(["cut", "flip", "remove"])
    if how == "cut":
        path.write_bytes(content[: target.rng.randrange(len(content))])
    elif how == "remove":
        path.unlink()
    else:
        content[target.rng.randrange(min(len(content), 200))] ^= 0xFF  # 0xFF makes text no text
        path.write_bytes(content)
    target.damaged = folders[-1].name


def break_data(target: Target) -> None:
    """The data server fails a few requests: the job waits it out."""
    kind = target.rng.choice([503, 429, "reset", "truncate"])
    target.server.faults += [Fault(kind) for _ in range(target.rng.randint(1, 3))]
    target.goes_on(3)


def lose_data(target: Target) -> None:
    """The data server is down for longer than `data.retry_seconds`: all ranks save and stop, with its address."""
    target.server.always = Fault(target.rng.choice([503, "reset"]))
    try:
        target.job.wait_for(lambda: not target.job.alive, "the end of patience")
        target.expect("failed", REFUSED, "cannot be read")
    finally:
        target.server.always = None


def break_wandb(target: Target) -> None:
    """The job logs to a W&B server that breaks every connection (`breaking_server`): it must train all the same."""
    target.goes_on(3)
    if target.job.step and "recorded off line" not in target.job.told:
        raise Failure("W&B broke, and nobody was told")


FAULTS: dict[str, Callable[[Target], None]] = {
    function.__name__: function
    for function in (
        *(kill_rank, kill_all, kill_launcher, term_launcher, term_rank, stop_rank, fill_disk, start_on_full_disk),
        *(damage, break_data, lose_data, break_wandb),
    )
}
AT_ANY_MOMENT = ("kill_rank", "kill_all", "kill_launcher", "term_launcher", "term_rank")
"""Kinds that may also befall a job that has not begun to train."""


def expected_step(run: Path, damaged: str | None) -> int:
    """The step that a start must go on from: of the newest checkpoint but the `damaged` one; 0 without any."""
    names = [path.name for path in (run / "checkpoints").glob("step_*") if path.name != damaged]
    return max((int(name.removeprefix("step_")) for name in names), default=0)


@contextmanager
def breaking_server() -> Iterator[str]:
    """The URL of a server that resets every connection."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def answer() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
