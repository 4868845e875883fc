"""How fast ranks talk to each other: on this machine, and between nodes where a launcher has started us on several."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from launch.doctor.devices import gpu_count
from launch.doctor.findings import Finding, gigabytes, ok, problem, warning

GPU_LINKS = {
    "V100-SXM": 150e9,
    "A100-SXM": 300e9,
    "H100 80GB HBM3": 450e9,
    "H200": 450e9,
    "B200": 900e9,
    "MI300X": 448e9,
}
"""Bytes per second and direction between the GPUs of a node, by words in their name (vendors' data sheets: NVLink,
Infinity Fabric)."""

_PCIE = 32e9  # generation 4, 16 lanes, a direction
_CPU = 0.2e9  # what two gloo ranks reach on any machine of the last years that has nothing else to do
_GOOD_SHARE = 0.4
_ALIKE = 0.7
_SKEW_WARNING, _SKEW_PROBLEM = 1.0, 60.0
_SMALL_SECONDS = 0.02  # of a small all-reduce: each step makes one
_LAUNCHERS = re.compile(r"RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_\w+|ROLE_\w+|MASTER_\w+|TORCHELASTIC_\w+")


def on_this_machine() -> list[Finding]:
    """Start a rank for each GPU, or two on the CPU, and let them reduce."""
    count = gpu_count()
    if count == 1:
        return [ok("links", "one GPU, so there is nothing to talk to")]
    count = count or 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ours = {name: value for name, value in os.environ.items() if not _LAUNCHERS.fullmatch(name)}
    ours |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    ours.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        output, command = Path(folder, "told.json"), [sys.executable, "-m", "launch.doctor.ranks"]
        logs = [Path(folder, f"rank_{rank}.log") for rank in range(count)]
        started = []
        for rank, log in enumerate(logs):
            with log.open("wb") as errors:
                environment = {**ours, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                started.append(subprocess.Popen([*command, str(output)], env=environment, stderr=errors, stdout=errors))
        codes = [process.wait() for process in started]
        if any(codes):
            rank = next(rank for rank, code in enumerate(codes) if code)
            lines = logs[rank].read_text(errors="replace").strip().splitlines() or ["without a word"]
            return [
                problem(
                    "links",
                    f"{count} ranks cannot talk: rank {rank} ended with exit code {codes[rank]}: {lines[-1]}",
                    "NCCL_DEBUG=INFO shows its choices; check shared memory, peer access, and GLOO_SOCKET_IFNAME=lo",
                )
            ]
        return judge(json.loads(output.read_text()))


def published_bytes_per_second() -> float | None:
    """Of this machine's network a direction, as its adapters say: all of InfiniBand, else the interface that leads
    out; None where they do not say."""
    rates = [path.read_text() for path in Path("/sys/class/infiniband").glob("*/ports/*/rate")]
    total = sum(float(found[1]) for text in rates if (found := re.match(r"([\d.]+) Gb/sec", text)))
    if total:
        return total * 1e9 / 8
    name = os.environ.get("GLOO_SOCKET_IFNAME") or _way_out()
    try:
        megabits = int(Path("/sys/class/net", name, "speed").read_text())
    except (OSError, ValueError):
        return None
    return megabits * 1e6 / 8 if megabits > 0 else None


def _way_out() -> str:
    """The interface of the default route; "" without one."""
    table = Path("/proc/net/route")
    routes = [line.split() for line in table.read_text().splitlines()[1:]] if table.exists() else []
    return next((route[0] for route in routes if route[1] == "00000000"), "")


def judge(told: Mapping[str, Any]) -> list[Finding]:
    """Findings of what `launch.doctor.ranks.measure` says.

    told: device, ranks (host, node, right, network, offset of each), bytes_per_second of an all-reduce (bus bandwidth),
    small_seconds of one of eight bytes, ring: (from, to, bytes per second) between the first ranks of nodes.
    """
    ranks, nodes = told["ranks"], {one["node"] for one in told["ranks"]}
    wrong = [rank for rank, one in enumerate(ranks) if not one["right"]]
    if wrong:
        cure = "leave their nodes out, and look for memory errors there; NCCL_DEBUG=INFO shows what carried the data"
        return [problem("links", f"ranks {wrong} received wrong sums", cure)]
    if len(nodes) == 1:
        return [_all_reduce("links", told, _within(told["device"])), _small("latency", told["small_seconds"])]
    networks = [one["network"] for one in ranks if one["network"] is not None]
    return [
        _all_reduce("all-links", told, min(networks, default=None)),
        _small("all-latency", told["small_seconds"]),
        *_between_nodes(told),
        _clocks(told),
    ]


def _within(device: str) -> float:
    """Bytes per second that are expected of the links of one machine whose devices are called `device`."""
    return _CPU if device == "cpu" else next((link for words, link in GPU_LINKS.items() if words in device), _PCIE)


def _all_reduce(name: str, told: Mapping[str, Any], expected: float | None) -> Finding:
    rate = told["bytes_per_second"]
    seen = f"all-reduce of {len(told['ranks'])} ranks on {told['device']}: {gigabytes(rate)}/s"
    figures = {"bytes_per_second": rate}
    if expected is None:
        return ok(name, f"{seen}; the adapters do not say what they could do", figures=figures)
    seen += f", and {gigabytes(expected)}/s are expected of its links"
    if rate >= _GOOD_SHARE * expected:
        return ok(name, seen, figures=figures)
    cure = (
        "NCCL_DEBUG=INFO shows which adapters and protocols are used; NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and"
        " NCCL_IB_HCA choose them"
        if name == "all-links"
        else "see peer-access and gpu-links (`nvidia-smi topo -m`), and what else runs here"
    )
    return warning(name, seen, cure, figures)


def _small(name: str, seconds: float) -> Finding:
    seen, figures = f"a small all-reduce takes {1000 * seconds:.2f} ms", {"seconds": seconds}
    if seconds < _SMALL_SECONDS:
        return ok(name, seen, figures=figures)
    cure = "more processes than cores, or a slow network between them: set OMP_NUM_THREADS, and bind ranks to cores"
    return warning(name, seen, cure, figures)


def _between_nodes(told: Mapping[str, Any]) -> list[Finding]:
    ranks = told["ranks"]
    label = {rank: f"{one['host']} (node {one['node']})" for rank, one in enumerate(ranks)}
    rates = [rate for _, _, rate in told["ring"]]
    usual = max(rates) if len(rates) == 2 else median(rates)
    slow = [
        f"{label[one]} to {label[other]}: {gigabytes(rate)}/s"
        for one, other, rate in told["ring"]
        if rate < _ALIKE * usual
    ]
    seen = f"{len(rates)} links between nodes carry {gigabytes(min(rates))}/s to {gigabytes(max(rates))}/s"
    figures = {"least_bytes_per_second": min(rates), "most_bytes_per_second": max(rates)}
    if slow:
        cure = "see to cables, ports and adapters of the nodes named most (ibstat, ethtool), or leave them out"
        return [warning("node-links", f"{seen}; slow: {'; '.join(slow)}", cure, figures)]
    return [ok("node-links", seen, figures=figures)]


def _clocks(told: Mapping[str, Any]) -> Finding:
    """Between ranks, of which those on one machine share a clock."""
    offsets = {one["host"]: one["offset"] for one in reversed(told["ranks"])}
    spread = max(offsets.values()) - min(offsets.values())
    far = ", ".join(f"{host} {offset:+.1f} s" for host, offset in offsets.items() if abs(offset) > _SKEW_WARNING)
    figures = {"spread_seconds": spread}
    if spread <= _SKEW_WARNING + told["small_seconds"]:
        return ok("rank-clocks", f"agree to {max(spread, told['small_seconds']):.2g} s", figures=figures)
    cure = "synchronise them: timedatectl set-ntp true on each; the watchdog compares their heartbeats"
    state = problem if spread > _SKEW_PROBLEM else warning
    return state("rank-clocks", f"{spread:.1f} s apart; against {told['ranks'][0]['host']}: {far}", cure, figures)
