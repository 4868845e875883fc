"""Run by every rank that the links are measured with: `python -m launch.doctor.ranks OUTPUT`; rank 0 writes OUTPUT.

Each rank joins the process group that its environment describes (RANK, WORLD_SIZE, MASTER_ADDR ...).
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from launch.doctor.links import published_bytes_per_second
from trainer import distributed

_JOIN_SECONDS = 60.0


def measure() -> dict[str, Any]:
    """All-reduce, links between nodes and clocks, the same on every rank; see `launch.doctor.links.judge`."""
    device, ranks = distributed.device(), distributed.world_size()
    tensor = torch.empty((64 if device.type == "cuda" else 8) << 20, device=device)

    def reduce_all() -> None:
        tensor.fill_(_share(distributed.rank()))
        dist.all_reduce(tensor)
        _wait(device)

    seconds = _best(reduce_all)
    right = bool((tensor == sum(map(_share, range(ranks)))).all())
    small = _best(lambda: distributed.all_reduce_sum([1.0]))
    facts = {
        "host": socket.gethostname(),
        "node": int(os.environ.get("GROUP_RANK", "0")),
        "right": right,
        "network": published_bytes_per_second(),
        "offset": _offset(),
    }
    told = distributed.all_gather_objects(facts)
    leaders = [rank for rank, one in enumerate(told) if rank == 0 or one["node"] != told[rank - 1]["node"]]
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "ranks": told,
        # what each link of a ring of all ranks carries ("bus bandwidth" of nccl-tests, doc/PERFORMANCE.md)
        "bytes_per_second": 2 * (ranks - 1) / ranks * tensor.nbytes / seconds,
        "small_seconds": small,
        "ring": _ring(leaders, tensor) if len(leaders) > 1 else [],
    }


def _share(rank: int) -> int:
    """What each element of a rank's tensor is: sums over two million ranks are exact in fp32."""
    return rank % 8 + 1


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best(action: Callable[[], object]) -> float:
    """Seconds of the quickest of up to 10 repetitions, about a second in all, of the slowest rank."""
    action()  # makes the connections
    distributed.barrier()
    times: list[float] = []
    repetitions = 1
    while len(times) < repetitions:
        start = time.perf_counter()
        action()
        times += distributed.all_reduce_max([time.perf_counter() - start])
        if len(times) == 1:
            repetitions = max(1, min(10, int(1 / times[0])))
    return min(times)


def _offset() -> float:
    """Seconds by which this rank's clock is ahead of rank 0's; known to about the time of a small all-reduce."""
    ahead = []
    for _ in range(5):
        distributed.barrier()
        times = distributed.all_gather_objects(time.time())
        ahead.append(times[distributed.rank()] - times[0])
    return median(ahead)


def _ring(leaders: list[int], tensor: torch.Tensor) -> list[tuple[int, int, float]]:
    """(from, to, bytes per second) of each leader's link to the next, all at once in both directions."""
    rank, received = distributed.rank(), torch.empty_like(tensor)
    distributed.barrier()
    mine: list[tuple[int, int, float]] = []
    if rank in leaders:
        place = leaders.index(rank)
        before, after = leaders[place - 1], leaders[(place + 1) % len(leaders)]
        for _ in range(2):  # the first makes the connections
            start = time.perf_counter()
            sending = dist.P2POp(dist.isend, tensor, after)
            receiving = dist.P2POp(dist.irecv, received, before)
            for work in dist.batch_isend_irecv([sending, receiving]):
                work.wait()
            _wait(tensor.device)
            mine = [(before, rank, tensor.nbytes / (time.perf_counter() - start))]
    return [link for links in distributed.all_gather_objects(mine) for link in links]


def main(output: str) -> int:
    """Join, measure, and write what was measured to `output` on rank 0."""
    with distributed.process_group(timeout_seconds=_JOIN_SECONDS):
        told = measure()
        if distributed.rank() == 0:
            Path(output).write_text(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
