"""Ranks that start warm: forked from a process that has imported what every run imports.

A process of `python -m trainer` works several seconds on imports before it does anything of its own, and a suite of
many hundred such processes would do little else. These share the imports; everything after them is a process's own:
arguments, environment, working folder, streams, threads, exit code. What they cannot show is what only a process from
nothing has: the command line of a launcher, variables that are read at import, and hash seeds that differ.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import math
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

PRELOADED = [
    *("trainer.main", "trainer.composition", "trainer.engine.zero", "torch._dynamo", "tokenizers.implementations"),
    *("deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.superoffload.superoffload_stage3"),
    *("deepspeed.module_inject.auto_ep_layer", "sacrebleu.metrics.bleu", "sacrebleu.metrics.chrf"),
]
GRACE_SECONDS = 30  # as torchrun's agents give

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


def run_warm(
    module: str, words: Sequence[str], ranks: int, cwd: Path, env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """`python -m module words` on `ranks` ranks, which find each other as under torchrun.

    When one fails the others are ended, and the exit code is 1, as torchrun's; that of a rank alone is its own.
    After `timeout` seconds all are killed, and the test fails with what they told.
    """
    command = [module, *words]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as at_the_end:
        paths = [Path(folder, name) for name in ("stdout", "stderr")]
        processes = [
            _context.Process(target=_become, args=(command, cwd, {**env, **place}, paths))
            for place in (_places(ranks, at_the_end) if ranks > 1 else [{}])
        ]
        for path in paths:
            path.touch()
        for process in processes:
            process.start()
            at_the_end.callback(process.join)
            at_the_end.callback(process.kill)
        ended_in_time = _wait(processes, timeout)
        stdout, stderr = (path.read_text() for path in paths)
        if not ended_in_time:
            message = f"{' '.join(command)}\nran longer than {timeout} s\n{stdout[-4000:]}\n{stderr[-8000:]}"
            pytest.fail(message, pytrace=False)
        codes = [process.exitcode or 0 for process in processes]
        return subprocess.CompletedProcess(command, codes[0] if ranks == 1 else int(any(codes)), stdout, stderr)


def _places(ranks: int, at_the_end: contextlib.ExitStack) -> list[dict[str, str]]:
    """The environment of each rank. The store by which they meet is in this process, as torchrun's is in its agent."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    at_the_end.callback(lambda: store)  # it lives as long
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _wait(processes: list[BaseProcess], timeout: float) -> bool:
    """Until all have ended; False if they did not in time."""
    deadline, patience = time.monotonic() + timeout, math.inf
    running = list(processes)
    while running:
        ended = wait([process.sentinel for process in running], min(deadline, patience) - time.monotonic())
        if not ended and time.monotonic() >= deadline:
            return False
        failed = any(process.exitcode for process in running)
        running = [process for process in running if process.exitcode is None]
        if failed and patience == math.inf:
            patience = time.monotonic() + GRACE_SECONDS
            for process in running:
                process.terminate()
        elif not ended:
            for process in running:
                process.kill()
            patience = deadline
    return True


def _become(command: list[str], cwd: Path, env: Mapping[str, str], streams: Sequence[Path]) -> None:
    """Be a process that somebody has started by `python -m` from elsewhere."""
    os.setsid()
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    missing = [name for name in PRELOADED if name not in sys.modules]
    assert not missing, f"not imported beforehand: {missing}"
    sys.argv = command
    gc.freeze()  # else the first pass copies every page of what is shared
    warnings.filterwarnings("ignore", ".*found in sys.modules after import of package", RuntimeWarning)
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    finally:  # as the interpreter does; multiprocessing leaves by os._exit
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
