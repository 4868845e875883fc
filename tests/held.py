"""A sink that holds a run after a step until a signal has come: a run too quick to be stopped in time waits for it."""

from __future__ import annotations

import signal
import socket

from trainer.metrics import Sink, StepInfo

STEP = 4
HELD = (f"+logging.held={{_target_:tests.held.Held,step:{STEP}}}", "allow_targets=[tests.]")
"""The words that add it; `metrics.jsonl` has the step by the time that it waits."""
SECONDS = 200


class Held(Sink):
    """`step`: the one after which it waits; a resumed run does not log it again."""

    def __init__(self, step: int) -> None:
        self.step = step

    def log(self, info: StepInfo) -> None:
        """Returns once a signal has reached this process: Python writes a byte to the socket as it comes."""
        if info.step != self.step:
            return
        heard, said = socket.socketpair()
        with heard, said:
            said.setblocking(False)
            heard.settimeout(SECONDS)
            previous = signal.set_wakeup_fd(said.fileno())
            try:
                heard.recv(1)
            finally:
                signal.set_wakeup_fd(previous)
