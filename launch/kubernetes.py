"""A Kubernetes cluster, by kubectl: Kubeflow's TrainJob or PyTorchJob, or JobSet."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.fields import field_problems, pod_problems
from launch.job import Job, Launcher, at_least
from launch.manifests import CONFIG_PATH, PLURALS, Kind, Pods, manifests, object_name
from launch.prepare import train_yaml
from trainer.errors import ConfigError, SetupError

MANIFEST = "manifest.yaml"
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_OWN_VARIABLES = ("PET_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_TAKEN = ("/runs", "/dev/shm", CONFIG_PATH)
_ENDED = ("Complete", "Completed", "Failed", "Succeeded")


class _Readable(yaml.SafeDumper):
    """YAML with texts of several lines as they are."""


_Readable.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


@dataclass(frozen=True)
class Kubernetes(Launcher):
    """One pod a node, each with one torchrun; see configs/launcher/kubernetes.yaml for the keys.

    runs_claim: the PersistentVolumeClaim that is runs_dir in all pods; `claim/folder` for a folder in it.
    """

    kind: Kind = "trainjob"
    image: str | None = None
    namespace: str | None = None
    nodes: int = 1
    gpus_per_node: int = 8
    gpu_resource: str = "nvidia.com/gpu"
    ranks_per_node: int | None = None
    cpus_per_node: str | int | None = None
    memory_per_node: str | None = None
    shared_memory: str | None = "16Gi"
    rdma: str | None = None
    runs_claim: str | None = None
    volumes: Mapping[str, str] | None = None
    environment: Mapping[str, str | int] | None = None
    secrets: Sequence[str] = ()
    working_dir: str | None = None
    restarts: int = 10
    save_seconds: int = 300
    pod: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        at_least(0, gpus_per_node=self.gpus_per_node, restarts=self.restarts)
        at_least(1, nodes=self.nodes, ranks_per_node=self.ranks_per_node, save_seconds=self.save_seconds)

    @property
    def world_size(self) -> int:
        return self.nodes * self._processes

    @property
    def _processes(self) -> int:
        return self.ranks_per_node or self.gpus_per_node or 1

    def render(self, job: Job) -> Mapping[str, str]:
        if problems := self._problems():
            raise ConfigError(*problems)
        documents = manifests(self.kind, self._pods(job))
        if problems := [f"{one['kind']} {problem}" for one in documents for problem in field_problems(one)]:
            raise ConfigError(*problems)
        return {MANIFEST: yaml.dump_all(documents, Dumper=_Readable, sort_keys=False, width=120)}

    def require(self) -> None:
        if shutil.which("kubectl") is None:
            raise SetupError(
                "launcher=kubernetes submits with kubectl, which is not on PATH; install it, or take the manifest that"
                " dry_run=true renders to where it is: kubectl create -f manifest.yaml"
            )

    def submit(self, job: Job) -> int:
        path = str(job.folder / MANIFEST)
        self._kubectl("delete", "--ignore-not-found=true", "--wait=true", "-f", path)  # what has ended cannot go on
        print(self._kubectl("create", "-f", path), end="", flush=True)
        namespace = {} if self.namespace is None else {"namespace": self.namespace}
        job.remember({"resource": f"{PLURALS[self.kind]}/{object_name(job.name)}", **namespace})
        return 0

    def alive(self, handle: Mapping[str, Any]) -> bool | None:
        if shutil.which("kubectl") is None:
            return None
        found = self._kubectl("get", "--ignore-not-found=true", "-o", "json", str(handle["resource"]), where=handle)
        if not found.strip():
            return False
        conditions = json.loads(found).get("status", {}).get("conditions", [])
        return not any(one["type"] in _ENDED and one["status"] == "True" for one in conditions)

    def stop(self, handle: Mapping[str, Any], hard: bool) -> str:
        self.require()
        now = ["--grace-period=0", "--force"] if hard else []
        resource = str(handle["resource"])
        self._kubectl("delete", "--ignore-not-found=true", "--wait=false", *now, resource, where=handle)
        return f"deleted {resource}" + ("" if hard else f"; its pods save and end within {self.save_seconds} s")

    def _kubectl(self, *words: str, where: Mapping[str, Any] | None = None) -> str:
        """What kubectl prints. where: a handle with the namespace; None: the manifest says it. Raises SetupError."""
        namespace = ["--namespace", str(where["namespace"])] if where is not None and "namespace" in where else []
        done = subprocess.run(["kubectl", *namespace, *words], capture_output=True, text=True)
        if done.returncode != 0:
            raise SetupError(f"kubectl {' '.join(words)} failed: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def _pods(self, job: Job) -> Pods:
        named = {
            self.gpu_resource: self.gpus_per_node or None,
            "cpu": self.cpus_per_node,
            "memory": self.memory_per_node,
        }
        resources = {name: quantity for name, quantity in named.items() if quantity is not None}
        if self.rdma is not None:
            resources[self.rdma] = 1
        return Pods(
            name=object_name(job.name),
            namespace=self.namespace,
            image=str(self.image),
            nodes=self.nodes,
            processes=self._processes,
            arguments=[*job.trainer_words(Path(CONFIG_PATH)), "runs_dir=/runs"],
            config=train_yaml(job.config),
            resources=resources,
            shared_memory=self.shared_memory,
            volumes={"/runs": str(self.runs_claim), **(self.volumes or {})},
            environment={name: str(value) for name, value in (self.environment or {}).items()},
            secrets=self.secrets,
            lock_memory=self.rdma is not None,
            working_dir=self.working_dir,
            restarts=self.restarts,
            save_seconds=self.save_seconds,
            spec=self.pod or {},
        )

    def _problems(self) -> list[str]:
        """What no cluster would take, by the launcher's own keys."""
        problems = []
        if not self.image:
            problems.append("launcher.image has no value; give the container image that has this project installed.")
        if self.runs_claim is None:
            problems.append(
                "launcher.runs_claim has no value; name the PersistentVolumeClaim for runs_dir: checkpoints kept in a"
                " pod end with it."
            )
        volumes = self.volumes or {}
        claims = {"runs_claim": self.runs_claim} | {f"volumes.{path}": place for path, place in volumes.items()}
        problems += [
            f"launcher.{key}={place}: {place.partition('/')[0]!r} is no name of a claim; write CLAIM or CLAIM/FOLDER."
            for key, place in claims.items()
            if place is not None and not _LABEL.fullmatch(place.partition("/")[0])
        ]
        problems += [
            f"launcher.volumes: {path} is no place to mount at; write an absolute path, not one of {', '.join(_TAKEN)}."
            for path in volumes
            if not path.startswith("/") or path.rstrip("/") in ("", *_TAKEN)
        ]
        problems += [
            f"launcher.environment.{name} is set by the operator and torchrun; leave it out."
            for name in self.environment or {}
            if name.startswith(_OWN_VARIABLES)
        ]
        return problems + pod_problems(self.pod or {}, "launcher.pod")
