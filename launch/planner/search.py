"""The fastest way to train a configuration on a cluster: every split, sharding and saving of memory that the trainer
can do, each predicted, and why the others will not do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pkgutil import resolve_name
from typing import Any

import torch

from launch.planner.found import Candidate, Failure, Found
from trainer.build import build
from trainer.config import (
    ActivationOffload,
    Config,
    EngineConfig,
    EngineKind,
    Offload,
    Precision,
    Recompute,
    config_to_dict,
)
from trainer.errors import ConfigError
from trainer.estimate import Cluster, Prediction, Shape, known_clusters, layout_of, predict, shape_of
from trainer.impossible import impossible
from trainer.parallel.split import check_split
from trainer.parts import engine_problems
from trainer.plan import make_plan
from trainer.wording import flatten

_OFFLOADS = (
    (Offload.none, Offload.none),
    (Offload.cpu, Offload.none),
    (Offload.cpu, Offload.cpu),
)
"""Of optimizer states and of parameters."""

_ALIKE = 1.01
"""Times of steps within this ratio are the same: no prediction is that exact, and fewer settings go wrong less."""

_NO_FASTER = 0.998
"""A larger micro-batch that gains less than this is not worth its memory, nor are larger ones."""

_MOST_NODES = 4096
"""The largest cluster that is looked at for one that fits."""


def choose(config: Config, cluster: Cluster) -> Found:
    """The fastest settings of `config.engine` and the micro-batch for `config` on all of `cluster`.

    Model, global batch, precision and everything else stay as they are; `data.lanes` is raised where ranks need more.
    Raises ConfigError where the batch does not divide over the ranks in any way, and where nothing fits: then with the
    smallest cluster of these nodes on which something does.
    """
    search = _Search(config, cluster)
    search.run()
    fitting = sorted(search.fitting, key=lambda one: (one.seconds, one.extras))
    if not fitting:
        if search.least is None:
            make_plan(config, cluster.ranks)  # says which batches divide
            raise ConfigError(*dict.fromkeys(failure.reason for failure in search.failures))
        raise too_small(config, cluster, search.least)
    surely = [one for one in fitting if one.prediction.surely_fits]
    best = _plainest(surely or fitting)
    seen, runners_up = {best.arrangement}, []
    for one in surely or fitting:
        if one.arrangement not in seen:
            seen.add(one.arrangement)
            runners_up.append(one)
    return Found(best, not surely, tuple(runners_up), tuple(search.failures), search.tried)


def _plainest(fastest_first: list[Candidate]) -> Candidate:
    """Of those as fast as the first, as far as predictions can tell, the one of the plainest settings."""
    alike = [one for one in fastest_first if one.seconds <= _ALIKE * fastest_first[0].seconds]
    return min(alike, key=lambda one: (one.extras, one.seconds))


def too_small(config: Config, cluster: Cluster, least: Candidate) -> ConfigError:
    """That the model does not fit on `cluster` however it is trained, and the smallest one on which it does."""
    what = (
        f"cluster={cluster.name} ({cluster.ranks} devices) is too small for this model and batch: even"
        f" {least.arrangement} with activations {least.saving} {_needed(least.prediction)}."
    )
    nodes = smallest_that_fits(config, cluster)
    if nodes is None:
        return ConfigError(
            f"{what} No number of these nodes up to {_MOST_NODES} will do: the peak does not shrink with more of them."
            " Take devices with more memory, or shorter sequences."
        )
    base = re.sub(r"_\d+x\d+$", "", cluster.name)
    cure = (
        f"cluster={base}_{nodes}x{cluster.gpus_per_node}" if base in known_clusters() else f"nodes: {nodes} in its file"
    )
    return ConfigError(f"{what} The smallest number of such nodes that fits is {nodes}: {cure}.")


def smallest_that_fits(config: Config, cluster: Cluster) -> int | None:
    """The least number of nodes on which some settings fit for the batch of `config`, above 64 of the multiples of 64;
    None where none will do."""
    largest: int = min(_MOST_NODES, config.batch.global_size)  # a node has work for at least one sample
    counts: list[int] = [*range(1, min(largest, 64) + 1), *(64 * step for step in range(2, largest // 64 + 1))]
    for nodes in counts:
        search = _Search(config, replace(cluster, nodes=nodes), only_smallest=True)
        search.run()
        if search.fitting:
            return nodes
    return None


class _Search:
    """One pass over all candidates."""

    def __init__(self, config: Config, cluster: Cluster, only_smallest: bool = False) -> None:
        """only_smallest: try the smallest micro-batch alone; enough to see whether anything fits."""
        self._config = config
        self._cluster = cluster
        self._shape: Shape = shape_of(config)
        self._flat = dict(flatten(config_to_dict(config)))
        self._task: type[Any] = resolve_name(config.task["_target_"])
        self._build_model = partial(build, _one_layer(config.model), "model")
        with torch.device("meta"):
            self._model: torch.nn.Module = self._build_model()
        self._only_smallest = only_smallest
        self.fitting: list[Candidate] = []
        self.failures: list[Failure] = []
        self.least: Candidate | None = None
        """Of all that do not fit, the one that lacks the smallest part."""
        self.tried = 0

    def run(self) -> None:
        """Fill the lists."""
        for sequence, tensor in _splits(self._cluster):
            engine = replace(self._config.engine, sequence_parallel=sequence, tensor_parallel=tensor)
            problem = self._split_problem(engine)
            if problem is not None:
                self.failures.append(Failure(engine, problem, float("inf")))
                continue
            for kind, stage, (states, parameters) in product(EngineKind, range(4), _OFFLOADS):
                self._arrange(
                    replace(engine, kind=kind, stage=stage, offload_optimizer=states, offload_parameters=parameters)
                )

    def _split_problem(self, engine: EngineConfig) -> str | None:
        """Why the model or the batch cannot be split so, in the trainer's own words."""
        try:
            plan = make_plan(_with(self._config, engine, 1, self._cluster.ranks), self._cluster.ranks)
            if plan.sequence_parallel * plan.tensor_parallel > 1:
                check_split(self._build_model, plan)
        except ConfigError as error:
            return str(error)
        # Of these settings alone, whichever engine it will be.
        alone = replace(
            EngineConfig(), sequence_parallel=engine.sequence_parallel, tensor_parallel=engine.tensor_parallel
        )
        return next(iter(engine_problems(replace(self._config, engine=alone), self._task, self._model)), None)

    def _arrange(self, engine: EngineConfig) -> None:
        """Try all savings and micro-batches of one arrangement."""
        smallest: Candidate | None = None
        found = False
        for recompute, offload in product(Recompute, ActivationOffload):
            lighter = replace(engine, recompute=recompute, offload_activations=offload)
            if self._impossible(lighter):
                continue
            for candidate in self._micro_batches(lighter):
                if candidate.prediction.fits:
                    self.fitting.append(candidate)
                    found = True
                elif smallest is None or _excess(candidate.prediction) < _excess(smallest.prediction):
                    smallest = candidate
        if smallest is not None and not found:
            excess = _excess(smallest.prediction)
            reason = f"{_needed(smallest.prediction)} with activations {smallest.saving}"
            self.failures.append(Failure(engine, reason, excess))
            if self.least is None or excess < _excess(self.least.prediction):
                self.least = smallest

    def _impossible(self, engine: EngineConfig) -> bool:
        """What the trainer's own rules exclude."""
        if engine.kind == EngineKind.zero and engine.stage == 0:
            return True  # plain does the same
        if self._config.precision == Precision.fp16 and engine.kind == EngineKind.plain:
            return True
        if engine.offload_optimizer != Offload.none and self._cluster.generation == "cpu":
            return True  # it is there already
        settings = {f"engine.{key}": getattr(engine, key) for key in EngineConfig.__dataclass_fields__}
        problems = impossible({**self._flat, **settings})
        return bool(problems or engine_problems(replace(self._config, engine=engine), self._task, self._model))

    def _micro_batches(self, engine: EngineConfig) -> Iterator[Candidate]:
        """From the smallest up, until one does not fit or is no faster than the one before."""
        ranks, before = self._cluster.ranks, float("inf")
        each = self._config.batch.global_size // (ranks // (engine.sequence_parallel * engine.tensor_parallel))
        for size in (size for size in range(1, each + 1) if each % size == 0):
            config = _with(self._config, engine, size, ranks)
            candidate = Candidate(config, predict(self._shape, layout_of(config, ranks), self._cluster))
            self.tried += 1
            yield candidate
            if self._only_smallest or not candidate.prediction.fits or candidate.seconds > _NO_FASTER * before:
                return
            before = candidate.seconds


def _splits(cluster: Cluster) -> Iterator[tuple[int, int]]:
    """(sequence, tensor) parallel ranks; within a node, for both exchange activations in every layer."""
    devices = min(cluster.gpus_per_node, cluster.ranks)
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    yield from ((sequence, tensor) for tensor, sequence in product(sizes, sizes) if sequence * tensor <= devices)


def _with(config: Config, engine: EngineConfig, size: int, ranks: int) -> Config:
    """`config` by another engine with `size` samples at once, in tokens where it counts in tokens."""
    batch = config.batch
    if batch.micro_tokens is None:
        batch = replace(batch, micro_size=size)
    else:
        layout = layout_of(config, config.engine.sequence_parallel * config.engine.tensor_parallel)
        batch = replace(batch, micro_tokens=size * max(1, layout.source_length + layout.target_length))
    groups = max(1, ranks // (engine.sequence_parallel * engine.tensor_parallel))
    return replace(config, engine=engine, batch=batch, data=_with_lanes(config.data, groups))


def _with_lanes(data: dict[str, Any], groups: int) -> dict[str, Any]:
    """`data` with lanes that the groups of ranks, and the workers of each, divide; as they are where they do."""
    if not isinstance(data.get("lanes"), int):
        return data
    parts = groups * max(1, data.get("workers") or 0)
    return data if data["lanes"] % parts == 0 else {**data, "lanes": -(-data["lanes"] // parts) * parts}


def _one_layer(model: dict[str, Any]) -> dict[str, Any]:
    """A model's part with one layer a stack: whether heads and units divide shows in the first."""
    layers = ("num_layers", "encoder_layers", "decoder_layers")
    return {**model, **{key: 1 for key in layers if isinstance(model.get(key), int) and model[key] > 0}}


def _excess(prediction: Prediction) -> float:
    """How many times what there is would be needed; of the device or the host, whichever lacks more."""
    return max(
        prediction.device_bytes.value / prediction.capacity, prediction.host_bytes.value / prediction.host_capacity
    )


def _needed(prediction: Prediction) -> str:
    """In words: how much memory would be needed, of how much, and what most of it is."""
    on_host = (
        prediction.host_bytes.value / prediction.host_capacity > prediction.device_bytes.value / prediction.capacity
    )
    terms, figure, capacity = (
        (prediction.host, prediction.host_bytes, prediction.host_capacity)
        if on_host
        else (prediction.memory, prediction.device_bytes, prediction.capacity)
    )
    largest = max(terms, key=lambda term: term.value)
    where = "host memory a device" if on_host else "device memory"
    return (
        f"needs {figure.value / 2**30:,.0f} GiB of {capacity / 2**30:,.0f} GiB {where}"
        f" ({largest.name} {largest.value / 2**30:,.0f} GiB)"
    )
