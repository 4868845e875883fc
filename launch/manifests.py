"""Kubernetes manifests of a job, as plain mappings: Kubeflow's TrainJob (v2) and PyTorchJob (v1), and JobSet.

One pod a node, all started together, each with one torchrun. How a pod ends decides what follows: exit code 0 is the
end, 2 (refused) fails the job at once, any other starts all pods again, up to `restarts` times, from the newest
checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal

from trainer.errors import UserError

Manifest = dict[str, Any]
Kind = Literal["trainjob", "pytorchjob", "jobset"]

REFUSED = UserError.exit_code
PORT = 29400
CONFIG_PATH = "/etc/shardwright"
"""Where the frozen configuration lies in a container."""

NAME_LENGTH = 48
"""Of a job: names of its pods and of their network, made of it, must stay within 63 characters."""

COMPLETION_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"

PLURALS: Mapping[Kind, str] = {
    "trainjob": "trainjobs.trainer.kubeflow.org",
    "pytorchjob": "pytorchjobs.kubeflow.org",
    "jobset": "jobsets.jobset.x-k8s.io",
}
"""What kubectl calls them."""


@dataclass(frozen=True)
class Pods:
    """The pods of a job. name: of the job, as Kubernetes takes it; processes: ranks of each pod; arguments: of
    `python -m launch.pod`; config: the frozen configuration; resources: of each pod, quantities by name; volumes: claim
    or `claim/folder` by the path it is mounted at; secrets: whose keys become variables; spec: further fields."""

    name: str
    namespace: str | None
    image: str
    nodes: int
    processes: int
    arguments: Sequence[str]
    config: str
    resources: Mapping[str, str | int] = field(default_factory=dict)
    shared_memory: str | None = None
    volumes: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: Sequence[str] = ()
    lock_memory: bool = False
    working_dir: str | None = None
    restarts: int = 0
    save_seconds: int = 300
    spec: Mapping[str, Any] = field(default_factory=dict)


def object_name(run: str) -> str:
    """The name of a run as Kubernetes takes it (RFC 1123 label, short); one that had to be changed gets a hash, so that
    two runs never share it."""
    clean = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if clean == run and len(run) <= NAME_LENGTH and clean[0].isalpha():
        return clean
    suffix = sha256(run.encode()).hexdigest()[:8]
    head = clean if clean[:1].isalpha() else f"run-{clean}"
    return f"{head[: NAME_LENGTH - 9].rstrip('-')}-{suffix}"


def manifests(kind: Kind, pods: Pods) -> list[Manifest]:
    """Everything to be created, in that order: the configuration first, the job last."""
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(pods),
        "data": {"train.yaml": pods.config},
    }
    makers = {"trainjob": train_job, "pytorchjob": pytorch_job, "jobset": job_set}
    return [config, *makers[kind](pods)]


def train_job(pods: Pods) -> list[Manifest]:
    """A TrainJob and the TrainingRuntime it runs in, which holds what a TrainJob cannot say: when to begin again."""
    labels = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    runtime = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": {**_metadata(pods), "labels": {"trainer.kubeflow.org/framework": "torch"}},
        "spec": {
            "mlPolicy": {"numNodes": pods.nodes, "torch": {}},
            "template": {"spec": _job_set_spec(pods, _container(pods, "node"), labels)},
        },
    }
    job = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(pods),
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "TrainingRuntime",
                "name": pods.name,
            },
            "trainer": {
                "image": pods.image,
                "command": _command(pods),
                "numNodes": pods.nodes,
                "numProcPerNode": pods.processes,
                **({"resourcesPerNode": resources} if (resources := _resources(pods)) else {}),
            },
        },
    }
    return [runtime, job]


def job_set(pods: Pods) -> list[Manifest]:
    """A JobSet of one indexed Job."""
    address = f"{pods.name}-node-0-0.{pods.name}"
    rendezvous: list[Manifest] = [
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": COMPLETION_INDEX}}},
        {"name": "PET_MASTER_ADDR", "value": address},
        {"name": "PET_MASTER_PORT", "value": str(PORT)},
    ]
    container = _container(pods, "node", rendezvous)
    spec = _job_set_spec(pods, container, {})
    return [
        {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": _metadata(pods), "spec": spec},
    ]


def pytorch_job(pods: Pods) -> list[Manifest]:
    """A PyTorchJob. Its operator looks at exit codes alone, and starts pods again for those from 128 on."""
    container = _container(pods, "pytorch")
    container["command"] = _command(pods, "--raise-retries")
    container["ports"] = [{"name": "pytorchjob-port", "containerPort": PORT}]

    def replicas(count: int) -> Manifest:
        spec = _pod_spec(pods, container)
        return {"replicas": count, "restartPolicy": "ExitCode", "template": {"spec": spec}}

    workers = {"Worker": replicas(pods.nodes - 1)} if pods.nodes > 1 else {}
    spec = {
        "nprocPerNode": str(pods.processes),
        "runPolicy": {"backoffLimit": pods.restarts, "cleanPodPolicy": "None"},
        "pytorchReplicaSpecs": {"Master": replicas(1), **workers},
    }
    return [{"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": _metadata(pods), "spec": spec}]


def _metadata(pods: Pods) -> Manifest:
    return {"name": pods.name, **({"namespace": pods.namespace} if pods.namespace else {})}


def _job_set_spec(pods: Pods, container: Manifest, labels: Mapping[str, str]) -> Manifest:
    """Exit code 2 fails the Job by its policy, and that fails the JobSet; any other end of a pod fails the Job for want
    of tries, and that begins the JobSet again."""
    refused = {"containerName": container["name"], "operator": "In", "values": [REFUSED]}
    job = {
        "completionMode": "Indexed",
        "completions": pods.nodes,
        "parallelism": pods.nodes,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": refused}]},
        "template": {"spec": {**_pod_spec(pods, container), "restartPolicy": "Never"}},
    }
    give_up = {"name": "refused", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {"maxRestarts": pods.restarts, "rules": [give_up]},
        "replicatedJobs": [
            {
                "name": "node",
                "replicas": 1,
                "template": {**({"metadata": {"labels": dict(labels)}} if labels else {}), "spec": job},
            }
        ],
    }


def _pod_spec(pods: Pods, container: Manifest) -> Manifest:
    """The pod; what the user adds goes beside what is here, lists one after the other."""
    volumes: list[Manifest] = [{"name": "config", "configMap": {"name": pods.name}}]
    if pods.shared_memory is not None:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": pods.shared_memory}})
    for claim in _claims(pods):
        volumes.append({"name": f"claim-{claim}", "persistentVolumeClaim": {"claimName": claim}})
    spec = {
        "terminationGracePeriodSeconds": pods.save_seconds + 30,
        "containers": [container],
        "volumes": volumes,
    }
    added = dict(pods.spec)
    for key in ("containers", "volumes"):
        if isinstance(added.get(key), list):
            added[key] = [*spec[key], *added[key]]  # type: ignore[misc]
    return {**spec, **added}


def _container(pods: Pods, name: str, rendezvous: Sequence[Manifest] = ()) -> Manifest:
    variables = {
        "PYTHONUNBUFFERED": "1",
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(pods.save_seconds),
        **pods.environment,
    }
    mounts: list[Manifest] = [{"name": "config", "mountPath": CONFIG_PATH, "readOnly": True}]
    if pods.shared_memory is not None:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    for path, place in pods.volumes.items():
        claim, _, folder = place.partition("/")
        mounts.append({"name": f"claim-{claim}", "mountPath": path, **({"subPath": folder} if folder else {})})
    container: Manifest = {
        "name": name,
        "image": pods.image,
        "command": _command(pods),
        "env": [{"name": key, "value": value} for key, value in variables.items()] + list(rendezvous),
        "volumeMounts": mounts,
    }
    if resources := _resources(pods):
        container["resources"] = resources
    if pods.secrets:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in pods.secrets]
    if pods.working_dir is not None:
        container["workingDir"] = pods.working_dir
    if pods.lock_memory:
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
    return container


def _command(pods: Pods, *first: str) -> list[str]:
    sizes = [f"--nnodes={pods.nodes}", f"--nproc-per-node={pods.processes}"]
    return ["python", "-m", "launch.pod", *first, *sizes, *(word.replace("$(", "$$(") for word in pods.arguments)]


def _claims(pods: Pods) -> list[str]:
    return list(dict.fromkeys(place.partition("/")[0] for place in pods.volumes.values()))


def _resources(pods: Pods) -> Manifest:
    """Limits, which are requests too where nothing else is said."""
    return {"limits": {name: str(quantity) for name, quantity in pods.resources.items()}} if pods.resources else {}
