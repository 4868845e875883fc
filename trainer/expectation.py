"""What a run is expected to take, by the formulas of `trainer.estimate`: told before it starts, and beside what it does
take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from trainer.errors import ConfigError
from trainer.estimate.cluster import known_clusters, load_cluster
from trainer.estimate.predict import predict
from trainer.estimate.reading import layout_of, shape_of
from trainer.host import memory_limit
from trainer.wording import amount

if TYPE_CHECKING:
    from trainer.config import BatchConfig, Config
    from trainer.estimate.cluster import Cluster
    from trainer.estimate.terms import Prediction

_NOT_TENSORS = ("libraries", "fragmentation")
_ANY_GPU = "a100_80gb"


@dataclass(frozen=True, slots=True)
class Expectation:
    """Of the rank that holds most, while it trains on the longest sequences that its task makes.

    memory_bytes: at the peak of a step, as `trainer.loop.memory_bytes` measures it: of tensors on a GPU, of the process
    on a CPU. step_seconds: of a step; None where the devices are not known. largest: the terms that weigh most, in
    words. warning: why it will not fit, and the smallest change with which it would; None where it fits.
    """

    memory_bytes: float
    step_seconds: float | None
    largest: str
    warning: str | None

    @property
    def told(self) -> str:
        """A line for people."""
        pace = "" if self.step_seconds is None else f", {self.step_seconds:.3g} s a step"
        return f"peak of a rank {amount(self.memory_bytes)} ({self.largest}){pace}"

    def beside(self, measured_bytes: float, measured_seconds: float) -> str:
        """The line that compares it with what a run took."""
        memory = f"memory: predicted {amount(self.memory_bytes)} / measured {amount(measured_bytes)}"
        if self.step_seconds is None:
            return memory
        return f"{memory}; step: predicted {self.step_seconds:.3g} s / measured {measured_seconds:.3g} s"


def figures(expected: Expectation | None) -> dict[str, float | None]:
    """What is predicted, for plan.json and whoever compares; None for what is not known."""
    return {
        "predicted_memory_bytes": None if expected is None else round(expected.memory_bytes),
        "predicted_step_seconds": None if expected is None else expected.step_seconds,
    }


def expect(config: Config, ranks: int) -> Expectation | None:
    """What `config` takes on so many ranks of devices like this process's own; None for a model or data of which the
    formulas know too little. Raises ConfigError where the batch does not divide."""
    cluster, known = _devices(ranks)
    prediction = _predicted(config, ranks, cluster)
    if prediction is None:
        return None
    on_cpu = cluster.generation == "cpu"
    terms = {term.name: term.value for term in (*prediction.memory, *(prediction.host if on_cpu else ()))}
    shown = {name: size for name, size in terms.items() if on_cpu or name not in _NOT_TENSORS}
    largest = sorted(shown, key=lambda name: -shown[name])[:3]
    return Expectation(
        memory_bytes=sum(shown.values()),
        step_seconds=prediction.step_seconds.value if known else None,
        largest=", ".join(f"{name} {amount(shown[name])}" for name in largest),
        warning=_warning(config, ranks, cluster, prediction),
    )


def _devices(ranks: int) -> tuple[Cluster, bool]:
    """A cluster of devices like this process's, with the memory that they have here; whether their speed is known."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    name, known = "cpu", False
    if torch.cuda.is_available():
        words = torch.cuda.get_device_name().lower()
        size = torch.cuda.mem_get_info()[1]
        alike = [one for one in known_clusters() if one.partition("_")[0] in words]
        alike.sort(key=lambda one: abs(load_cluster(one).memory_gib * 2**30 - size))
        name, known = (alike or [_ANY_GPU])[0], bool(alike)
    cluster = replace(load_cluster(name).with_ranks(ranks), host_memory_gib=memory_limit() / 2**30)
    cluster = replace(cluster, gpus_per_node=max(local, 1))
    if name == "cpu":
        return replace(cluster, memory_gib=cluster.host_memory_gib / max(local, 1), usable=1.0), known
    return replace(cluster, memory_gib=torch.cuda.mem_get_info()[1] / 2**30), known


def _predicted(config: Config, ranks: int, cluster: Cluster) -> Prediction | None:
    layout = layout_of(config, ranks)
    if not config.model["_target_"].startswith("trainer."):
        return None  # of other people's models nothing is known, and trying them out may do anything
    if not layout.source_length + layout.target_length:
        return None
    shape = shape_of(config)
    return None if shape.other is not None else predict(shape, layout, cluster)


def _warning(config: Config, ranks: int, cluster: Cluster, prediction: Prediction) -> str | None:
    """Which memory is too small for the peak, and the first change that would make it fit."""
    if prediction.fits:
        return None
    on_device = prediction.device_bytes.value > prediction.capacity
    needed = (prediction.device_bytes if on_device else prediction.host_bytes).value
    there = prediction.capacity if on_device else prediction.host_capacity
    what = "device memory" if on_device and cluster.generation != "cpu" else "host memory for each rank"
    text = f"this run will probably not fit: a rank is predicted to need {amount(needed)}, of {amount(there)} of {what}"
    for words, changed in _changes(config, ranks):
        other = _predicted(changed, ranks, cluster)
        if other is not None and other.fits:
            return f"{text}. {words} should fit, with {amount(other.device_bytes.value)}."
    return f"{text}. No micro-batch, recomputing or ZeRO stage alone makes it fit: use more ranks, or a smaller model."


def _changes(config: Config, ranks: int) -> Iterator[tuple[str, Config]]:
    """Changes that need less memory, those first that cost least time; each with the words that make it."""
    for words, batch in _smaller_batches(config):
        yield from _possible(words, replace(config, batch=batch), ranks)
    recomputing = type(config.engine.recompute)
    for mode in (recomputing.selective, recomputing.full):
        engine = replace(config.engine, recompute=mode)
        yield from _possible(f"engine.recompute={mode.value}", replace(config, engine=engine), ranks)
    zero = type(config.engine.kind).zero
    for stage in range(config.engine.stage + 1, 4):
        engine = replace(config.engine, kind=zero, stage=stage)
        yield from _possible(f"engine=zero{stage}", replace(config, engine=engine), ranks)
        engine = replace(engine, recompute=recomputing.full)
        smallest = config.batch if config.batch.micro_tokens else replace(config.batch, micro_size=1)
        together = replace(config, engine=engine, batch=smallest)
        said = "" if config.batch.micro_tokens else " batch.micro_size=1"
        yield from _possible(f"engine=zero{stage} engine.recompute=full{said}", together, ranks)


def _smaller_batches(config: Config) -> Iterator[tuple[str, BatchConfig]]:
    batch = config.batch
    size = batch.micro_tokens or batch.micro_size or batch.global_size
    key = "micro_tokens" if batch.micro_tokens else "micro_size"
    while size > 1:
        size //= 2
        yield (
            f"batch.{key}={size}",
            replace(batch, micro_tokens=size) if batch.micro_tokens else replace(batch, micro_size=size),
        )


def _possible(words: str, config: Config, ranks: int) -> Iterator[tuple[str, Config]]:
    try:
        layout_of(config, ranks)
    except ConfigError:
        return
    yield words, config
