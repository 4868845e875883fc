"""The Kubernetes launcher: what it refuses, what it hands to kubectl, and what its containers do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.__main__ import main
from launch.prepare import submitted

WORDS = [
    "launcher=kubernetes",
    "launcher.image=registry/shardwright:1",
    "launcher.runs_claim=runs",
    "launcher.gpus_per_node=0",
]
TINY = ["experiment=digits_mlp", "steps=4", "log.every=2", "logging=[]", "eval.max_samples=32", "eval.final_split=none"]

KUBECTL = """#!{python}
import json, pathlib, sys
folder = pathlib.Path(__file__).parent
with (folder / "calls.jsonl").open("a") as calls:
    manifest = open(sys.argv[-1]).read() if "-f" in sys.argv else None
    calls.write(json.dumps([sys.argv[1:], manifest]) + "\\n")
answer = folder / sys.argv[1 if sys.argv[1] != "--namespace" else 3]
if answer.exists():
    print(answer.read_text(), end="")
sys.exit(1 if (folder / "refuse").exists() else 0)
"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a kubectl that writes down what it is told; a file of a command's name there is its answer."""
    folder = tmp_path / "bin"
    folder.mkdir()
    command = folder / "kubectl"
    command.write_text(KUBECTL.format(python=sys.executable))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    return folder


def calls(folder: Path) -> list[tuple[list[str], str | None]]:
    return [tuple(json.loads(line)) for line in (folder / "calls.jsonl").read_text().splitlines()]


def test_a_dry_run_renders_the_manifest_and_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no kubectl here
    assert main([*WORDS, *TINY, "launcher.nodes=2", "dry_run=true"]) == 0
    text = (tmp_path / "runs/digits_mlp/launch/manifest.yaml").read_text()
    assert text in capsys.readouterr().out
    config, _, job = yaml.safe_load_all(text)
    assert yaml.safe_load(config["data"]["train.yaml"])["steps"] == 4
    assert job["kind"] == "TrainJob" and job["metadata"]["name"].startswith("digits-mlp-")


def test_without_kubectl_a_submission_is_refused_with_the_way_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*WORDS, *TINY]) == 2
    error = capsys.readouterr().err
    assert "kubectl, which is not on PATH" in error and "dry_run=true" in error


def test_a_submission_creates_the_manifest_and_is_found_and_stopped(kubectl: Path, tmp_path: Path) -> None:
    assert main([*WORDS, *TINY, "launcher.kind=jobset", "launcher.namespace=team"]) == 0
    folder = tmp_path / "runs/digits_mlp/launch"
    (deleted, _), (created, manifest) = calls(kubectl)
    assert deleted[0] == "delete" and created == ["create", "-f", str(folder / "manifest.yaml")]
    assert manifest == (folder / "manifest.yaml").read_text()
    launcher, handle = submitted(folder)
    name = yaml.safe_load_all(manifest).__next__()["metadata"]["name"]
    assert handle == {"resource": f"jobsets.jobset.x-k8s.io/{name}", "namespace": "team"}

    status = {"status": {"conditions": [{"type": "StartupPolicyCompleted", "status": "True"}]}}
    (kubectl / "get").write_text(json.dumps(status))
    assert launcher.alive(handle) is True
    assert main([*WORDS, *TINY, "launcher.kind=jobset", "launcher.namespace=team"]) == 2  # it has not ended
    status["status"]["conditions"].append({"type": "Failed", "status": "True"})
    (kubectl / "get").write_text(json.dumps(status))
    assert launcher.alive(handle) is False
    (kubectl / "get").write_text("")  # gone
    assert launcher.alive(handle) is False

    assert "save and end" in launcher.stop(handle, hard=False)
    assert calls(kubectl)[-1][0][:3] == ["--namespace", "team", "delete"] and "--force" not in calls(kubectl)[-1][0]
    launcher.stop(handle, hard=True)
    assert {"--force", "--grace-period=0"} <= set(calls(kubectl)[-1][0])


def test_what_the_cluster_refuses_is_told(kubectl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (kubectl / "refuse").touch()
    (kubectl / "delete").write_text("no such resource type TrainJob\n")
    assert main([*WORDS, *TINY]) == 2
    assert "no such resource type TrainJob" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["launcher.image=null", "launcher.runs_claim=null"],
            ["launcher.image has no value", "launcher.runs_claim has"],
        ),
        (["launcher.runs_claim=Runs_1"], ["launcher.runs_claim=Runs_1: 'Runs_1' is no name of a claim"]),
        (["launcher.volumes={data:corpora}"], ["launcher.volumes: data is no place to mount at"]),
        (["launcher.volumes={/runs:corpora}"], ["launcher.volumes: /runs is no place to mount at"]),
        (["launcher.environment={RANK:0}"], ["launcher.environment.RANK is set by the operator"]),
        (["launcher.memory_per_node=10GiB"], ["limits.memory: '10GiB' is no quantity"]),
        (["launcher.nodes=0"], ["nodes=0 is below the least possible value, 1"]),
        (["launcher.kind=job"], ["launcher.kind='job' is not one of trainjob"]),
        (
            ["launcher.pod={nodeSelecter:{a:b},priority:high}"],
            [
                "launcher.pod.nodeSelecter is no field of PodSpec; did you mean nodeSelector?",
                "launcher.pod.priority='high'",
            ],
        ),
    ],
)
def test_what_cannot_be_is_named_by_its_key(
    words: list[str], expected: list[str], kubectl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, *TINY, *words]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in expected), error
    assert not (kubectl / "calls.jsonl").exists()


RANK = """
import os, signal, sys, time
if sys.argv[1] == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("waiting", flush=True)
    time.sleep(60)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.dist
@pytest.mark.parametrize(("option", "code", "expected"), [([], 2, 2), (["--raise-retries"], 75, 203)])
def test_a_container_ends_with_the_exit_code_of_its_ranks(
    option: list[str], code: int, expected: int, tmp_path: Path, trainer_env: dict[str, str], free_port: int
) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "launch.pod", *option, "--nproc-per-node=2", str(tmp_path / "rank.py"), str(code)]
    env = {**trainer_env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    assert subprocess.run(command, env=env, capture_output=True, timeout=120).returncode == expected


@pytest.mark.dist
def test_a_container_that_is_told_to_end_lets_its_ranks_save(
    tmp_path: Path, trainer_env: dict[str, str], free_port: int
) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    env = {**trainer_env, "MASTER_PORT": str(free_port)}
    command = [sys.executable, "-m", "launch.pod", "--nproc-per-node=1", str(tmp_path / "rank.py"), "wait"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 75


@pytest.mark.dist
def test_the_pods_of_a_job_set_train_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer_env: dict[str, str], free_port: int
) -> None:
    """Two containers as the manifest says, as far as a machine without a kubelet can: their command, their variables,
    the mounted configuration and the shared folder of runs."""
    monkeypatch.chdir(tmp_path)
    assert main([*WORDS, *TINY, "launcher.kind=jobset", "launcher.nodes=2", "dry_run=true"]) == 0
    config, job = yaml.safe_load_all((tmp_path / "runs/digits_mlp/launch/manifest.yaml").read_text())
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "train.yaml").write_text(config["data"]["train.yaml"])
    pods = [start(pod, index, tmp_path, {**trainer_env, "GLOO_SOCKET_IFNAME": "lo"}, free_port) for index in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in pods]
    assert [process.returncode for process in pods] == [0, 0], "\n".join(outputs)
    run = tmp_path / "shared" / "digits_mlp"
    assert json.loads((run / "plan.json").read_text())["world_size"] == 2
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def start(
    pod: dict[str, Any], index: int, tmp_path: Path, environment: dict[str, str], port: int
) -> subprocess.Popen[str]:
    """What a kubelet does with the pod of this index, on this host."""
    (container,) = pod["containers"]
    (tmp_path / "shared").mkdir(exist_ok=True)
    here = {"/etc/shardwright": str(tmp_path / "config"), "/runs": str(tmp_path / "shared")}
    words = [sys.executable, *container["command"][1:]]
    for mounted, folder in here.items():
        words = [word.replace(f"={mounted}", f"={folder}") for word in words]
    variables = {one["name"]: one.get("value", str(index)) for one in container["env"]}
    variables |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
    env = {**environment, **variables}
    return subprocess.Popen(words, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
