"""What is measured, against what is published, among devices and among ranks."""

from __future__ import annotations

import pytest

from launch.doctor import links
from launch.doctor.devices import compare, cpu_peak, judge_gpu
from launch.doctor.nodes import Report, outliers
from tests.launch.doctor.examine import examine

H100 = {
    "flops_per_second": 640e12,
    "memory_bytes_per_second": 2.9e12,
    "host_bytes_per_second": 55e9,
    "differing_products": 0,
}


def test_a_gpu_is_held_against_its_kind():
    assert judge_gpu("GPU 0", "NVIDIA H100 80GB HBM3", H100).state == "ok"
    slow = judge_gpu("GPU 3", "NVIDIA H100 80GB HBM3", H100 | {"flops_per_second": 300e12})
    assert slow.state == "warning" and "GPU 3" in slow.seen and "slow (matrix)" in slow.seen
    assert judge_gpu("GPU 0", "NVIDIA A100 80GB PCIe", H100 | {"memory_bytes_per_second": 0.9e12}).state == "warning"
    assert judge_gpu("GPU 0", "Some Other Card", H100).state == "ok", "nothing is published of it here"
    wrong = judge_gpu("GPU 0", "NVIDIA H100 80GB HBM3", H100 | {"differing_products": 1})
    assert wrong.state == "problem" and "computes wrongly" in wrong.cure


def test_the_slowest_among_devices_is_named():
    node = {f"GPU {index}": dict(H100) for index in range(8)}
    assert compare(node) == []
    node["GPU 5"]["flops_per_second"] = 400e12
    (found,) = compare(node)
    assert found.state == "warning" and "GPU 5 at 62%" in found.seen and "GPU 4" not in found.seen


def test_the_slowest_among_nodes_is_named():
    def report(host, rate):
        return Report(host, [judge_gpu("GPU 0", "NVIDIA H100 80GB HBM3", H100 | {"flops_per_second": rate})])

    assert outliers([report("a", 640e12), report("b", 630e12)]) == []
    (told,) = outliers([report("a", 640e12), report("b", 630e12), report("c", 480e12)])
    assert "c GPU 0 at 76%" in told.findings[0].seen


def test_the_peak_of_a_cpu():
    information = "cpu MHz\t\t: 2000.000\nflags\t: sse avx2 avx512f\n"
    assert cpu_peak(information, threads=4) == 2e9 * 4 * 64
    assert cpu_peak(information.replace("avx512f", ""), 1) == 2e9 * 32
    assert cpu_peak("Features\t: fp asimd\n", 1) is None


def told(device="cpu", rate=1e9, network=None, nodes=1, **changed):
    """What four ranks say that measured their links."""
    ranks = [
        {"host": f"n{rank * nodes // 4}", "node": rank * nodes // 4, "right": True, "network": network, "offset": 0.0}
        for rank in range(4)
    ]
    ring = [(rank, (rank + 4 // nodes) % 4, rate) for rank in range(0, 4, 4 // nodes)] if nodes > 1 else []
    facts = {"device": device, "ranks": ranks, "bytes_per_second": rate, "small_seconds": 1e-4, "ring": ring}
    return {**facts, **changed}


def judged(**facts):
    return {finding.name: finding for finding in links.judge(told(**facts))}


@pytest.mark.parametrize(
    "facts, state",
    [
        ({}, "ok"),
        ({"rate": 5e6}, "warning"),
        ({"device": "NVIDIA H100 80GB HBM3", "rate": 330e9}, "ok"),
        ({"device": "NVIDIA H100 80GB HBM3", "rate": 20e9}, "warning"),
        ({"device": "NVIDIA L4", "rate": 14e9}, "ok"),
        ({"nodes": 2, "network": 12.5e9, "rate": 9e9}, "ok"),
        ({"nodes": 2, "network": 12.5e9, "rate": 1e9}, "warning"),
        ({"nodes": 2, "network": None, "rate": 1e7}, "ok"),
    ],
)
def test_an_all_reduce_is_held_against_its_links(facts, state):
    found = judged(**facts)["all-links" if facts.get("nodes") else "links"]
    assert found.state == state and "all-reduce of 4 ranks" in found.seen


def test_a_slow_link_between_nodes_is_named():
    ring = [(0, 1, 10e9), (1, 2, 9.8e9), (2, 3, 2e9), (3, 0, 10e9)]
    found = judged(nodes=4, network=12.5e9, rate=9e9, ring=ring)["node-links"]
    assert found.state == "warning" and "slow: n2 (node 2) to n3 (node 3): 2 GB/s" in found.seen


def test_wrong_sums_and_late_clocks_are_problems():
    facts = told()
    facts["ranks"][2]["right"] = False
    (found,) = links.judge(facts)
    assert found.state == "problem" and "ranks [2]" in found.seen
    facts = told(nodes=2)
    for rank in (2, 3):
        facts["ranks"][rank]["offset"] = -95.0
    found = {finding.name: finding for finding in links.judge(facts)}["rank-clocks"]
    assert found.state == "problem" and "n1 -95.0 s" in found.seen


@pytest.mark.dist
def test_ranks_that_cannot_talk(tmp_path):
    code, found = examine("links", env={"GLOO_SOCKET_IFNAME": "nosuch0"})
    assert code == 1 and "2 ranks cannot talk" in found["links"]["seen"] and "nosuch0" in found["links"]["seen"]
