"""The driver of a job on Ray, `python -m launch.ray_train FOLDER`, and what each of its workers does.

A worker starts the trainer as a process of its own: a rank needs signals, and the main thread, for itself. Ray places
the workers and starts them again; the trainer forms its own process group and goes on from its newest checkpoint.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from launch.ray import STOP, read_job
from trainer.errors import UserError

ENDED = "ended"
STORE_BYTES = 100 << 20
"""Of a Ray of this machine alone: only Ray's own notes go through it. By default it may take 30 % of the memory."""
POLL_SECONDS = 0.2


class RankFailed(RuntimeError):
    """A rank ended with an exit code that makes it worth to begin again."""


def main(folder: Path) -> int:
    """Run the job in `folder` to its end; returns its exit code. A signal asks all ranks to save and end."""
    import ray
    from ray.exceptions import RayActorError
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from launch.ray_train import train_rank  # by its name, which workers can import, not as part of __main__

    def stop(number: int, frame: FrameType | None) -> None:
        (folder / STOP).touch()

    job = read_job(folder)
    own: dict[str, Any] = {
        "include_dashboard": False,
        "num_cpus": max(os.cpu_count() or 1, job["cpus"]),
        "object_store_memory": STORE_BYTES,
    }
    ray.init(address=job["address"], runtime_env=job["runtime_env"] or None, **({} if job["address"] else own))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, stop)
    trainer = TorchTrainer(
        train_rank,
        train_loop_config={**job, "folder": str(folder)},
        torch_config=TorchConfig(backend="gloo"),  # for the workers to agree; ranks have a group of their own
        scaling_config=ScalingConfig(
            num_workers=job["workers"],
            use_gpu="GPU" in job["resources"],
            resources_per_worker=job["resources"],
            placement_strategy=job["placement"],
        ),
        run_config=RunConfig(
            name="job",
            storage_path=str(folder / "ray"),
            failure_config=FailureConfig(max_failures=job["max_failures"]),
        ),
    )
    try:
        code: int = trainer.fit().return_value
    except (TrainingFailedError, RayActorError) as error:  # the latter: a part of Ray itself was killed
        print(f"launch.ray_train: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        ray.shutdown()
    return code


def train_rank(job: Mapping[str, Any]) -> int:
    """One rank: the trainer's process, watched until it and all others have ended; returns the exit code of the first
    that failed, or 0. Raises RankFailed where Ray is to begin again."""
    import torch.distributed as dist
    from ray.train import get_context

    context = get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    here = os.environ["MASTER_ADDR"] if rank == 0 else ""
    box = [(here, _free_port(), _free_port())]
    dist.broadcast_object_list(box, src=0)
    address, port, own_port = box[0]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, own_port, world_size, is_master=rank == 0, timeout=timedelta(seconds=300)
    )
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    folder = Path(job["folder"])
    cwd = job["cwd"] if Path(job["cwd"]).is_dir() else None
    with subprocess.Popen([sys.executable, *job["words"]], env=environment, cwd=cwd) as process:
        try:
            _watch(process, store, folder / STOP, job["save_seconds"])
        except BaseException:
            process.kill()
            raise
    dist.barrier()
    code = int(store.get(ENDED)) if store.check([ENDED]) else 0
    dist.barrier()  # rank 0 keeps the store
    if code in (0, UserError.exit_code) or (folder / STOP).exists():
        return code
    raise RankFailed(f"exit code {code}")


def _watch(process: subprocess.Popen[bytes], store: Any, stop: Path, save_seconds: float) -> None:
    """Wait until the process ends; tell it to end where another rank has failed or a stop is asked for. The store gets
    the exit code of the first rank that fails."""
    told_at: float | None = None
    while process.poll() is None:
        if told_at is None and (store.check([ENDED]) or stop.exists()):
            process.terminate()
            told_at = time.monotonic()
        if told_at is not None and time.monotonic() - told_at > save_seconds:
            process.kill()
        time.sleep(POLL_SECONDS)
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    if code != 0:
        store.compare_set(ENDED, "", str(code))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    return port


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
