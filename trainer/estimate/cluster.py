"""Machines by name: configs/cluster/*.yaml and how many of them, as in `h100_8x8`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from trainer.errors import ConfigError
from trainer.wording import did_you_mean

GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class Cluster:
    """Equal nodes of equal devices. Rates are per device and one way, in units a second, as data sheets have them.

    memory_gib: of a device; usable: the part of it that a process can have, beside the driver's context. peak_flops:
    dense matrix products by precision, FLOP/s. memory_bandwidth: of a device, B/s. within_bandwidth: between two
    devices of a node, B/s; between_bandwidth: of a device's share of its node's network cards, B/s. host_bandwidth:
    between a device and its host's memory, B/s. host_memory_gib, disk_bandwidth (B/s), cpu_bandwidth (of the host's
    memory, B/s): of a node. generation: whose kernels' efficiencies hold. power_share: of the data
    sheet's power that devices are allowed. price_per_hour: of one device.
    """

    name: str
    generation: str
    memory_gib: float
    peak_flops: Mapping[str, float]
    memory_bandwidth: float
    gpus_per_node: int
    within_bandwidth: float
    between_bandwidth: float
    host_memory_gib: float
    host_bandwidth: float
    cpu_bandwidth: float
    disk_bandwidth: float
    nodes: int = 1
    usable: float = 0.97
    power_share: float = 1.0
    price_per_hour: float | None = None

    @property
    def ranks(self) -> int:
        """Devices of all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def capacity(self) -> float:
        """Bytes of a device that a process can have."""
        return self.memory_gib * GIB * self.usable

    @property
    def host_capacity(self) -> float:
        """Bytes of host memory for each device."""
        return self.host_memory_gib * GIB / self.gpus_per_node

    def with_ranks(self, ranks: int) -> Cluster:
        """The same machines, as many nodes as `ranks` need."""
        return replace(self, nodes=-(-ranks // self.gpus_per_node))


def cluster_folder() -> Path:
    """configs/cluster, of a clone or an installed wheel."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return (inside if inside.is_dir() else package.parent / "configs") / "cluster"


def known_clusters() -> list[str]:
    """Names that `load_cluster` takes, each with or without _NODESxGPUS."""
    return sorted(path.stem for path in cluster_folder().glob("*.yaml"))


def load_cluster(name: str) -> Cluster:
    """The cluster of a name such as `a100_80gb` (one node), `h100_8x8` (nodes x devices of each), or of a YAML file.

    Raises ConfigError for an unknown name, with those that are known, and for a file that does not say what a cluster
    is.
    """
    if name.endswith((".yaml", ".yml")):
        return _read(Path(name), Path(name).stem)
    base, counts = name, re.fullmatch(r"(.+)_(\d+)x(\d+)", name)
    if counts is not None:
        base = counts[1]
    if base not in known_clusters():
        known = known_clusters()
        raise ConfigError(
            f"cluster={name} is not known{did_you_mean(base, known)} There are {', '.join(known)},"
            " each also with its nodes and devices, as in h100_8x8; or name a YAML file of your own."
        )
    cluster = _read(cluster_folder() / f"{base}.yaml", name)
    if counts is None:
        return cluster
    nodes, devices = int(counts[2]), int(counts[3])
    if not nodes or not devices:
        raise ConfigError(f"cluster={name} has no devices; the numbers are nodes x devices of each, as in h100_8x8.")
    return replace(cluster, nodes=nodes, gpus_per_node=devices)


def _read(path: Path, name: str) -> Cluster:
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except OSError as error:
        raise ConfigError(f"cluster={path} cannot be read: {error.strerror}.") from error
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"cluster={path} is no YAML file: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"cluster={path} holds no mapping; begin with a copy of configs/cluster/h100.yaml.")
    known = {field.name for field in fields(Cluster)} - {"name"}
    optional = {"nodes", "usable", "power_share", "price_per_hour"}
    problems = [f"{path}: {key} is no key of a cluster{did_you_mean(key, known)}" for key in values if key not in known]
    problems += [f"{path}: {key} has no value." for key in sorted(known - optional) if values.get(key) is None]
    for key, value in values.items():
        numbers = value.values() if key == "peak_flops" and isinstance(value, dict) else [value]
        wanted = key in known - {"generation"} and value is not None
        if wanted and not all(isinstance(number, int | float) and number > 0 for number in numbers):
            problems.append(f"{path}: {key}={value!r} is not a number above 0.")
    if problems:
        raise ConfigError(*problems)
    return Cluster(name=name, **values)
