"""Ranks from the variables that Slurm gives its tasks."""

from __future__ import annotations

import pytest

from trainer.srun import first_host, ranks_from_srun

TASK = {
    "SLURM_JOB_ID": "31234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "10",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2",
    "SLURM_STEP_NODELIST": "node[007-009]",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}
"""The last task of ten on three nodes."""


def test_a_task_of_a_step_is_a_rank() -> None:
    assert ranks_from_srun(TASK) == {
        "RANK": "9", "WORLD_SIZE": "10", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node007",
        "MASTER_PORT": "21234",
    }  # fmt: skip


def test_what_a_person_has_set_stays() -> None:
    found = ranks_from_srun({**TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert not {"MASTER_ADDR", "MASTER_PORT"} & set(found) and found["RANK"] == "9"


def test_steps_side_by_side_have_ports_of_their_own() -> None:
    assert ranks_from_srun({**TASK, "SLURM_STEP_ID": "1"})["MASTER_PORT"] != ranks_from_srun(TASK)["MASTER_PORT"]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {name: value for name, value in TASK.items() if "STEP" not in name},  # a batch script
        {**TASK, "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
        {**TASK, "RANK": "3"},  # torchrun within a step
    ],
)
def test_elsewhere_nothing_is_found(environment: dict[str, str]) -> None:
    assert ranks_from_srun(environment) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("vm", "vm"),
        ("a,b", "a"),
        ("node[007-012,020],login1", "node007"),
        ("gpu-a[3,5]-ib,x", "gpu-a3-ib"),
        ("login1,node[1-2]", "login1"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
