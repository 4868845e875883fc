"""The ranks of a job whose tasks `srun` started, without torchrun: the variables that torch reads, from Slurm's."""

from __future__ import annotations

import re
from collections.abc import Mapping


def ranks_from_srun(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, and as MASTER_ADDR and MASTER_PORT the first host of the step and
    a port made of the job's number, unless they are set.

    Empty where a launcher has said the rank already, outside of a step (in a batch script, SLURM_PROCID is 0 too), and
    in a step of a single task, which may be a shell or a torchrun.
    """
    if "RANK" in environment or "SLURM_STEP_ID" not in environment:
        return {}
    world_size = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if world_size == 1:
        return {}
    local_sizes = _per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    number = int(environment["SLURM_JOB_ID"]) + 101 * int(environment["SLURM_STEP_ID"])  # steps may run side by side
    ours = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(local_sizes[int(environment["SLURM_NODEID"])]),
        "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(10000 + number % 20000),
    }
    return {name: value for name, value in ours.items() if name not in environment}


def first_host(nodes: str) -> str:
    """The first name of Slurm's list of nodes: `node007` of `node[007-012,020],login1`."""
    parts = re.match(r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\])?([^,\[]*)", nodes)
    assert parts is not None, nodes
    return "".join(part or "" for part in parts.groups())


def _per_node(counts: str) -> list[int]:
    """Tasks on each node: [4, 4, 2] of `4(x2),2`."""
    sizes: list[int] = []
    for part in counts.split(","):
        size, _, times = part.rstrip(")").partition("(x")
        sizes += [int(size)] * int(times or 1)
    return sizes
