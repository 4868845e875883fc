"""Is this machine fit to train on? `python -m launch.doctor [--json] [only=CHECK,CHECK] [runs_dir=runs]`

Looks at versions, compilers, GPUs, speeds, links, limits, disks and the network, and says of each finding what mends
it. Each check runs by itself, within a time limit. On several nodes the links between them are measured too, and
rank 0 tells what all found:

    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_endpoint=HOST:PORT -m launch.doctor

Exit code: 0 when nothing is a problem (warnings may be), 1 when something is, 2 when the command line is wrong.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from launch.doctor import devices, environment, gpus, limits, links, network, nodes, software, storage
from launch.doctor.isolation import Check, run_checks
from launch.doctor.nodes import Report
from launch.doctor.report import as_json, show
from trainer.commands import run_command
from trainer.errors import ConfigError
from trainer.wording import did_you_mean


@dataclass(frozen=True)
class DoctorOptions:
    """Arguments of `python -m launch.doctor`.

    json: one JSON object instead of a table (also as --json); only: names of checks, with commas, None = all; runs_dir:
    the folder that runs are to be written to.
    """

    json: bool = False
    only: str | None = None
    runs_dir: str = "runs"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = ["json=true" if word == "--json" else word for word in (sys.argv[1:] if argv is None else argv)]
    problems: list[bool] = []
    usage = f"{__doc__}\nChecks: {', '.join(check.name for check in all_checks('runs'))}"
    code = run_command(DoctorOptions, lambda options: problems.append(_examine(options)), usage, arguments)
    return code or int(any(problems))


def all_checks(runs_dir: str) -> list[Check]:
    """Every check, in the order of the table."""
    broken = "importing torch or starting its driver hangs: see `nvidia-smi` and `dmesg`; a reboot may be due"
    stuck = "what it reads from does not answer: a network file system that is gone? see `mount` and `dmesg`"
    dropped = (
        "packets are dropped or names not resolved: see the network, https_proxy; export HF_HUB_OFFLINE=1 without one"
    )
    busy = "something else uses the devices up, or one hangs: see `nvidia-smi` and `top`"
    silent = "ranks do not reach each other: see shared memory, peer access; GLOO_SOCKET_IFNAME=lo on one machine"
    return [
        Check("packages", software.packages, "look", 15, stuck),
        Check("torch", software.torch_and_driver, "look", 40, broken),
        Check("deepspeed", software.deepspeed, "look", 40, broken),
        Check("compilers", software.compilers, "look", 20, stuck),
        Check("gpus", gpus.gpus, "look", 30, broken),
        Check("peers", devices.peers, "look", 40, broken),
        Check("speed", devices.speed, "measure", 90, busy),
        Check("links", links.on_this_machine, "measure", 60, silent),
        Check("shared_memory", limits.shared_memory, "look", 10, stuck),
        Check("ulimits", limits.ulimits, "look", 10, stuck),
        Check("memory", limits.memory, "look", 10, stuck),
        Check("processors", limits.processors, "look", 10, stuck),
        Check("disk", storage.disk, "measure", 30, stuck, (runs_dir,)),
        Check("caches", storage.caches, "look", 10, stuck),
        Check("hub", network.hub, "ask", 12, dropped),
        Check("wandb", network.wandb, "ask", 12, dropped),
        Check("proxies", network.proxies, "ask", 12, dropped),
        Check("interfaces", network.interfaces, "ask", 12, dropped),
        Check("locale", environment.text, "look", 10, stuck),
        Check("settings", environment.settings, "look", 10, stuck),
    ]


def _examine(options: DoctorOptions) -> bool:
    """Whether something is a problem, once it is told."""
    from rich.console import Console

    checks = _chosen(options)
    with Console(stderr=True).status("looking at this machine, some 10 seconds"):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            reports = nodes.together(checks)
        else:
            reports = [Report(socket.gethostname(), run_checks(checks))]
    if not reports:
        return False  # another rank tells it
    if options.json:
        print(as_json(reports))
    else:
        show(reports)
    return any(finding.state == "problem" for report in reports for finding in report.findings)


def _chosen(options: DoctorOptions) -> list[Check]:
    checks = all_checks(options.runs_dir)
    if options.only is None:
        return checks
    known = [check.name for check in checks]
    wanted = [name.strip() for name in options.only.split(",")]
    problems = [
        f"only={name} is no check{did_you_mean(name, known)} Known: {', '.join(known)}."
        for name in wanted
        if name not in known
    ]
    if problems:
        raise ConfigError(*problems)
    return [check for check in checks if check.name in wanted]


if __name__ == "__main__":
    sys.exit(main())
