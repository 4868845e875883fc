"""Manifests: what they say, and that the published models of Kubeflow and Kubernetes know every field of them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from launch.fields import field_problems
from launch.manifests import Pods, job_set, manifests, object_name, pytorch_job, train_job

PODS = Pods(
    name="quickstart",
    namespace="team",
    image="registry/shardwright:1",
    nodes=2,
    processes=8,
    arguments=["-m", "trainer", "--config-path=/etc/shardwright", "runs_dir=/runs"],
    config="name: quickstart\n",
    resources={"nvidia.com/gpu": 8, "memory": "500Gi", "rdma/hca": 1},
    shared_memory="64Gi",
    volumes={"/runs": "runs/team", "/data": "corpora"},
    environment={"NCCL_DEBUG": "INFO"},
    secrets=["wandb"],
    lock_memory=True,
    working_dir="/work",
    restarts=10,
    save_seconds=300,
    spec={"nodeSelector": {"pool": "gpu"}, "volumes": [{"name": "scratch", "emptyDir": {}}]},
)
KINDS = ("trainjob", "pytorchjob", "jobset")


def pod_of(kind: str, pods: Pods = PODS) -> dict[str, Any]:
    """The pod's spec in a manifest of that kind."""
    made = manifests(kind, pods)
    if kind == "pytorchjob":
        return made[-1]["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    spec = made[1]["spec"]["template"]["spec"] if kind == "trainjob" else made[1]["spec"]
    return spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_models_know_every_field(kind: str) -> None:
    assert [problem for manifest in manifests(kind, PODS) for problem in field_problems(manifest)] == []


def test_a_pytorch_job_fits_the_client_of_kubeflows_first_operator() -> None:
    """That package's models check themselves when they are built, and give back what they know under its own names."""
    pytest.importorskip("kubeflow.training")
    from kubernetes.client import ApiClient

    (manifest,) = pytorch_job(PODS)
    assert through_client(manifest, "KubeflowOrgV1PyTorchJob", ApiClient()) == manifest


def test_the_client_of_kubernetes_knows_pods_and_configuration() -> None:
    pytest.importorskip("kubernetes")
    from kubernetes.client import ApiClient

    for kind in KINDS:
        pod = pod_of(kind)
        assert through_client(pod, "V1PodSpec", ApiClient()) == pod
    config = manifests("jobset", PODS)[0]
    assert through_client(config, "V1ConfigMap", ApiClient()) == config
    job = job_set(PODS)[0]["spec"]["replicatedJobs"][0]["template"]
    assert through_client(job, "V1JobTemplateSpec", ApiClient()) == job


def through_client(manifest: dict[str, Any], model: str, client: Any) -> dict[str, Any]:
    """`manifest` read into the client's model and written again: fields the model does not know are gone."""
    import kubeflow.training.models as kubeflow_models
    import kubernetes.client.models as kubernetes_models

    known = {**vars(kubernetes_models), **vars(kubeflow_models)}

    def read(value: Any, kind: str) -> Any:
        if value is None:
            return None
        if inner := re.fullmatch(r"list\[(.+)\]", kind):
            return [read(one, inner[1]) for one in value]
        if inner := re.fullmatch(r"dict\((.+), (.+)\)", kind):
            return {key: read(one, inner[2]) for key, one in value.items()}
        if kind not in known:
            return value
        names = known[kind].attribute_map
        given = {own: read(value.get(names[own]), below) for own, below in known[kind].openapi_types.items()}
        return known[kind](**{own: one for own, one in given.items() if one is not None})

    return client.sanitize_for_serialization(read(manifest, model))


@pytest.mark.parametrize("kind", ["trainjob", "jobset"])
def test_a_refused_run_fails_at_once_and_any_other_end_begins_again(kind: str) -> None:
    made = manifests(kind, PODS)
    spec = made[1]["spec"]["template"]["spec"] if kind == "trainjob" else made[1]["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": {"containerName": "node", "operator": "In", "values": [2]}}
    ]
    assert spec["failurePolicy"]["maxRestarts"] == 10
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in spec["failurePolicy"]["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (0, "Never")
    assert job["completions"] == job["parallelism"] == 2 and job["completionMode"] == "Indexed"


def test_a_pytorch_job_tells_its_operator_what_to_try_again_by_exit_codes() -> None:
    (manifest,) = pytorch_job(PODS)
    roles = manifest["spec"]["pytorchReplicaSpecs"]
    assert {role: (one["replicas"], one["restartPolicy"]) for role, one in roles.items()} == {
        "Master": (1, "ExitCode"),
        "Worker": (1, "ExitCode"),
    }
    command = roles["Worker"]["template"]["spec"]["containers"][0]["command"]
    assert command[:6] == ["python", "-m", "launch.pod", "--raise-retries", "--nnodes=2", "--nproc-per-node=8"]
    assert list(pytorch_job(replace(PODS, nodes=1))[0]["spec"]["pytorchReplicaSpecs"]) == ["Master"]


@pytest.mark.parametrize("kind", KINDS)
def test_pods_have_their_resources_volumes_and_time_to_save(kind: str) -> None:
    pod = pod_of(kind)
    container = pod["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "memory": "500Gi", "rdma/hca": "1"}
    mounts = {mount["mountPath"]: (mount["name"], mount.get("subPath")) for mount in container["volumeMounts"]}
    claims = {
        one["name"]: one["persistentVolumeClaim"]["claimName"] for one in pod["volumes"] if "claim" in one["name"]
    }
    assert (claims[mounts["/runs"][0]], mounts["/runs"][1]) == ("runs", "team")
    assert (claims[mounts["/data"][0]], mounts["/data"][1]) == ("corpora", None)
    (memory,) = (one["emptyDir"] for one in pod["volumes"] if one["name"] == mounts["/dev/shm"][0])
    assert memory == {"medium": "Memory", "sizeLimit": "64Gi"}
    variables = {one["name"]: one.get("value") for one in container["env"]}
    assert variables["NCCL_DEBUG"] == "INFO"
    assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert {"name": "scratch", "emptyDir": {}} in pod["volumes"] and len(pod["volumes"]) == 5


def test_a_train_job_runs_in_its_own_runtime_and_sets_no_variable_of_torchrun() -> None:
    runtime, job = train_job(PODS)
    reference = job["spec"]["runtimeRef"]
    assert (reference["kind"], reference["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    assert (job["spec"]["trainer"]["numNodes"], job["spec"]["trainer"]["numProcPerNode"]) == (2, 8)
    assert "env" not in job["spec"]["trainer"]  # the trainer's webhook refuses PET_... there
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    labels = node["template"]["metadata"]["labels"]
    assert labels["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"


def test_the_pods_of_a_job_set_meet_at_its_first() -> None:
    variables = {one["name"]: one for one in pod_of("jobset")["containers"][0]["env"]}
    assert variables["PET_MASTER_ADDR"]["value"] == "quickstart-node-0-0.quickstart"
    index = variables["PET_NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"


@pytest.mark.parametrize("run", ["quickstart", "a/b", "sweep-lr=0.1,seed=2", "v1.2", "7b", "x" * 200, "_a", "Ä"])
def test_names_are_what_kubernetes_takes(run: str) -> None:
    name = object_name(run)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(f"{name}-node-0-1023") <= 63
    assert object_name(run) == name


def test_runs_never_share_a_name() -> None:
    runs = ["lr=0.1", "lr=0,1", "lr-0-1", "LR-0-1", "x" * 200, "x" * 201]
    assert len({object_name(run) for run in runs}) == len(runs)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"nodeSelecter": {}}, r"nodeSelecter is no field of PodSpec; did you mean nodeSelector\?"),
        ({"hostNetwork": "yes"}, r"hostNetwork='yes': .*boolean"),
        ({"dnsPolicy": "Cluster"}, r"dnsPolicy='Cluster': .*ClusterFirst"),
        ({"tolerations": [{}, {"operator": 3}]}, r"tolerations\[1\].operator=3: .*string"),
        ({"tolerations": {"key": "gpu"}}, "tolerations: .* is no list"),
        (
            {"volumes": [{"name": "a", "emptyDir": {"sizeLimit": "64GiB"}}]},
            r"volumes\[.\].emptyDir.sizeLimit: '64GiB' is no",
        ),
        ({"volumes": [{"emptyDir": {}}]}, r"volumes\[\d\].name is missing"),
        ({"securityContext": 1}, "securityContext: 1 is no mapping"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_field_that_cannot_be_is_named(kind: str, spec: dict[str, Any], expected: str) -> None:
    made = manifests(kind, replace(PODS, nodes=1, spec=spec))
    (problem,) = [problem for manifest in made for problem in field_problems(manifest)]
    assert re.search(rf"\.template\.spec\.{expected}", problem)
