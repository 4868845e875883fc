"""What torchrun is told, wherever it is started."""

from __future__ import annotations

import os
from collections.abc import Sequence

from launch.job import python


def torchrun(
    ranks: int, max_restarts: int, rendezvous: Sequence[str], trainer_words: Sequence[str], interpreter: str = ""
) -> list[str]:
    """The command of the agent on one host, with `ranks` processes. rendezvous: how it meets agents of other hosts;
    interpreter: "" for this environment's."""
    options = [f"--nproc-per-node={ranks}", f"--max-restarts={max_restarts}", *rendezvous]
    return [interpreter or python(), "-m", "torch.distributed.run", *options, *trainer_words]


def environment(threads: int | None, ranks: int, save_seconds: int) -> dict[str, str]:
    """Variables for the agent and its ranks: threads of each (None: its share of this host's cores), the signals that
    the agent passes on, and how long it then waits for the last save. torchrun itself would wait 30 s."""
    return {
        "OMP_NUM_THREADS": str(threads or max(1, len(os.sched_getaffinity(0)) // ranks)),
        "PYTHONUNBUFFERED": "1",
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(save_seconds),
    }
