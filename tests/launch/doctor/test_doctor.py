"""The whole command: its table, its JSON, its exit codes, and several nodes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from launch.doctor.__main__ import all_checks, main
from tests.conftest import ROOT, find_free_port
from tests.launch.doctor.examine import environment

NAMES = {
    *("python", "packages", "torch", "bf16", "attention", "deepspeed", "compiler", "ninja", "nvcc", "libaio"),
    *("gpus", "peer-access", "links", "latency", "shared-memory", "open-files", "locked-memory"),
    *("core-files", "memory", "processors", "disk", "disk-speed", "temporary", "hub-cache", "build-cache"),
    *("hub", "clock", "wandb", "proxies", "hostname", "locale", "settings"),
}


@pytest.mark.dist
@pytest.mark.slow
def test_everything_on_this_machine(tmp_path):
    """Each finding has the same fields, and what matters is measured for real."""
    command = [sys.executable, "-m", "launch.doctor", "--json", f"runs_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=240)
    told = json.loads(done.stdout)
    assert list(told) == ["state", "findings"]
    for finding in told["findings"]:
        assert list(finding) == ["host", "name", "state", "seen", "cure", "figures"]
        assert finding["state"] in ("ok", "warning", "problem", "skipped") and finding["seen"]
        assert finding["cure"] or finding["state"] in ("ok", "skipped")
    found = {finding["name"]: finding for finding in told["findings"]}
    assert set(found) >= NAMES
    assert done.returncode == (told["state"] == "problem") == any(one["state"] == "problem" for one in found.values())
    for name in ("torch", "deepspeed", "links"):
        assert found[name]["state"] in ("ok", "warning"), found[name]
    speed = next(finding for name, finding in found.items() if name in ("cpu-speed", "gpu-speed"))
    assert all(rate > 1e8 for name, rate in speed["figures"].items() if name.endswith("per_second"))
    assert found["links"]["figures"]["bytes_per_second"] > 1e6


@pytest.mark.dist
@pytest.mark.slow
def test_several_nodes_report_to_the_first(tmp_path):
    """Two agents of torchrun on one host stand for two nodes; links between them are measured, and both look around."""
    port = find_free_port()
    agents = []
    for node in range(2):
        words = ["--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
        launcher = [sys.executable, "-m", "torch.distributed.run", *words, f"--master_port={port}"]
        environ = environment(OMP_NUM_THREADS="1" if node == 0 else "512")
        command = [*launcher, "-m", "launch.doctor", "--json", "only=processors,disk", f"runs_dir={tmp_path}"]
        agents.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        (told, errors), (silent, _) = [agent.communicate(timeout=200) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    assert told, errors
    assert not silent, "one table is enough"
    findings = json.loads(told)["findings"]
    named = [finding["name"] for finding in findings]
    for name in ("node-links", "all-links", "all-latency", "rank-clocks"):
        assert named.count(name) == 1, name
    assert named.count("disk") == named.count("processors") == 2, "each node looks at its own machine"
    threads = [finding["state"] for finding in findings if finding["name"] == "processors"]
    assert threads == ["ok", "warning"]


def test_a_table_for_people(capsys):
    assert main(["only=settings,locale"]) == 0
    told = capsys.readouterr().out
    assert "settings" in told and "no debugging switches are on" in told and "2 ok" in told


@pytest.mark.parametrize(
    "words, told",
    [
        (["only=diks"], "only=diks is no check; did you mean disk? Known: packages, torch"),
        (["runs-dir=x"], "Unknown key runs-dir=x; did you mean runs_dir?"),
        (["--jsn"], "'--jsn' is not key=value."),
    ],
)
def test_a_wrong_command_line(capsys, words, told):
    assert main(words) == 2
    assert told in capsys.readouterr().err


def test_help_starts_without_torch():
    words = "import sys; from launch.doctor.__main__ import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.endswith("False\n") and "shared_memory" in done.stdout


def test_every_finding_and_check_is_documented():
    text = (ROOT / "docs" / "doctor.md").read_text()
    for name in {*NAMES, *(check.name for check in all_checks("runs"))}:
        assert f"`{name}`" in text, name
