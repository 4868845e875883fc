"""Under a launcher with several ranks: the first rank of each node looks at its machine, and rank 0 gathers it all.

What is gathered goes through the launcher's key-value store, not a collective: a node that is silent is a finding.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from launch.doctor.devices import compare
from launch.doctor.findings import Finding, problem
from launch.doctor.isolation import Check, run_checks
from launch.doctor.links import judge

_MEETING_SECONDS = 60.0


@dataclass(frozen=True)
class Report:
    """What one machine found."""

    host: str
    findings: list[Finding]


def talk(output: str) -> list[Finding]:
    """This rank's part in measuring the links between all ranks; on rank 0, what they came to."""
    from launch.doctor import ranks

    ranks.main(output)
    path = Path(output)
    return judge(json.loads(path.read_text())) if path.exists() else []


def together(checks: Sequence[Check]) -> list[Report]:
    """The reports of all nodes on rank 0; nothing on other ranks, which go on to their end."""
    from torch.distributed import DistError
    from torch.distributed.rendezvous import rendezvous

    host = socket.gethostname()
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=_MEETING_SECONDS)))
    except (DistError, RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        cure = "MASTER_ADDR must be a name of the first node that all others reach, and no firewall between them"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return [Report(host, [problem("rendezvous", f"{address} does not answer: {lines[0]}", cure)])]
    findings = _talk_to_all()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        alone = os.environ.get("LOCAL_WORLD_SIZE") == str(world_size)  # then the links have been measured
        findings += run_checks([check for check in checks if not (alone and check.name == "links")])
    store.set(f"doctor/{rank}", json.dumps({"host": host, "findings": [asdict(finding) for finding in findings]}))
    if rank > 0:
        return []
    deadline = time.monotonic() + sum(check.seconds for check in checks) + _MEETING_SECONDS
    reports = []
    for other in range(world_size):
        left = timedelta(seconds=max(0.1, deadline - time.monotonic()))
        try:
            store.wait([f"doctor/{other}"], left)
            told = json.loads(store.get(f"doctor/{other}"))
            reports.append(Report(told["host"], [Finding(**entry) for entry in told["findings"]]))
        except (DistError, RuntimeError):
            cure = "see its log; leave its node out if it stays silent"
            reports.append(Report(f"rank {other}", [problem("nodes", "said nothing in time", cure)]))
    return [*reports, *outliers(reports)]


def _talk_to_all() -> list[Finding]:
    with tempfile.TemporaryDirectory() as folder:
        check = Check(
            "links",
            talk,
            "measure",
            150.0,
            "a rank did not come, or its messages are dropped: open all ports between nodes, set GLOO_SOCKET_IFNAME and"
            " NCCL_SOCKET_IFNAME to the interface that they share; NCCL_DEBUG=INFO shows where NCCL waits",
            (str(Path(folder, "told.json")),),
            # the store is there already, with the launcher or with our rank 0
            {
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
            },
        )
        return run_checks([check])


def outliers(reports: Sequence[Report]) -> list[Report]:
    """Devices that are slower than those of the same kind on other nodes."""
    measured: dict[str, dict[str, Mapping[str, float]]] = {}
    for report in reports:
        for finding in report.findings:
            if finding.name in ("cpu-speed", "gpu-speed") and finding.figures:
                device = finding.seen.partition(",")[0] if finding.name == "gpu-speed" else "CPU"
                measured.setdefault(finding.name, {})[f"{report.host} {device}"] = finding.figures
    found = [finding for kind in measured.values() for finding in compare(kind)]
    return [Report("all nodes", found)] if found else []
