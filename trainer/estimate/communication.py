"""Seconds of collectives: rings of ranks over the links of a node and between nodes."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.estimate.activations import stacks
from trainer.estimate.cluster import Cluster
from trainer.estimate.fitted import Fitted
from trainer.estimate.layout import Layout
from trainer.estimate.local import Local
from trainer.estimate.shape import Shape


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that exchange something. bandwidth: bytes a second that pass each of them; link: over what."""

    ranks: int
    link: str
    bandwidth: float
    hop_seconds: float

    @classmethod
    def of(cls, ranks: int, stride: int, cluster: Cluster, fitted: Fitted) -> Group:
        """Every `stride`-th rank, so many. Between nodes, a ring passes through each node once, by the network cards of
        all its members there; other groups have the other cards."""
        size = cluster.gpus_per_node
        within = cluster.within_bandwidth * fitted.link
        if ranks * stride <= size:
            return cls(ranks, "within", within, fitted.hop_seconds)
        members = max(1, size // stride)
        between = cluster.between_bandwidth * members * fitted.link
        return cls(ranks, "between", min(within, between), fitted.hop_seconds)

    def scatter(self, size: float, times: float = 1.0) -> float:
        """Seconds of `times` reduce-scatters or all-gathers of `size` bytes together: (n - 1) / n of them pass a rank,
        in n - 1 hops each (Chan et al. 2007; Thakur et al. 2005)."""
        n = self.ranks
        if n == 1:
            return 0.0
        return size * (n - 1) / n / self.bandwidth + times * (n - 1) * self.hop_seconds

    def all_reduce(self, size: float, times: float = 1.0) -> float:
        """The same of all-reduces: a reduce-scatter and an all-gather."""
        return 2 * self.scatter(size, times)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One kind of collective in a step. seconds: if nothing hid it; sent: bytes of a rank; hideable: whether it can run
    beneath computation."""

    name: str
    link: str
    seconds: float
    sent: float
    hideable: bool
    formula: str
    inputs: dict[str, float]


def exchanges(shape: Shape, layout: Layout, cluster: Cluster, fitted: Fitted) -> list[Exchange]:
    """Everything that ranks send in a step."""
    found = [*_sharded(shape, layout, cluster, fitted)]
    if shape.other is None:
        found += [
            *_tensor(shape, layout, cluster, fitted),
            *_sequence(shape, layout, cluster, fitted),
            *_pipeline(shape, layout, cluster, fitted),
        ]
    return [one for one in found if one.seconds > 0]


def _sharded(shape: Shape, layout: Layout, cluster: Cluster, fitted: Fitted) -> list[Exchange]:
    """Of parameters and gradients: data parallel and ZeRO (Rajbhandari et al. 2020, section 7)."""
    local, system, stage = Local.of(shape, layout), layout.system, layout.zero_stage
    group = Group.of(layout.zero_ranks, layout.tensor, cluster, fitted)
    replicas = layout.sharing // layout.zero_ranks
    size, m = local.parameters, layout.accumulation
    layers = shape.layers / layout.pipeline + 1
    n = (group.ranks - 1) / group.ranks
    found = []

    def add(name: str, times: float, each: float, calls: float, all_reduce: bool = False) -> None:
        factor = 2 if all_reduce else 1
        seconds = factor * group.scatter(size * each * times, calls * times)
        kind = "all-reduce" if all_reduce else "reduce-scatter" if "gradients" in name else "all-gather"
        found.append(
            Exchange(
                f"{kind} of {name}",
                group.link,
                seconds,
                factor * n * size * each * times,
                system.overlaps,
                "times x parameters of the rank x bytes x (n - 1) / n / bandwidth + collectives x (n - 1) x hop"
                + (", twice" if all_reduce else ""),
                {"times": times, "parameters of the rank": size, "bytes": each, "n": float(group.ranks),
                 "bandwidth": group.bandwidth, "collectives": calls * times, "hop": group.hop_seconds},
            )
        )  # fmt: skip

    if stage == 0:
        add("gradients", 1, shape.trained * system.sent_gradient, layers, all_reduce=True)
    else:
        reductions = m if stage >= 2 and system.reduces_every_micro_batch else 1
        add(
            "gradients",
            reductions,
            shape.trained * system.sent_gradient,
            layers,
            all_reduce=system.all_reduces_gradients,
        )
        stays = _kept_until_backward(shape, local, layout)
        gathers = 1 if stage < 3 else m * (1 + max(0.0, 1 - stays / size))
        add("parameters", gathers, system.working, layers)
    if replicas > 1 and stage:
        across = Group.of(replicas, layout.tensor * layout.zero_ranks, cluster, fitted)
        shard = size * system.sent_gradient / layout.zero_ranks
        inputs = {"shard": shard, "n": float(replicas), "bandwidth": across.bandwidth}
        formula = "2 x bytes of the shard x (n - 1) / n / bandwidth"
        seconds, sent = across.all_reduce(shard, layers), 2 * shard * (replicas - 1) / replicas
        found.append(Exchange("all-reduce over replicas", across.link, seconds, sent, system.overlaps, formula, inputs))
    return found


def _kept_until_backward(shape: Shape, local: Local, layout: Layout) -> float:
    """ZeRO-3: elements that are gathered once for forward and backward.

    DeepSpeed fetches ahead with every module, up to `stage3_max_live_parameters` (1e9) elements, and does not give back
    what it has seen there of the backward pass: what goes into that number from the end of the forward pass, in whole
    modules (a layer has four). The first token table is through before that; it stays where its next use comes before
    others of `stage3_max_reuse_distance` (1e9) elements, each passed twice. `launch.planner.count` sees it.
    """
    most = layout.system.live_elements
    if not most:
        return 0.0
    table = 0.0 if shape.tied else local.tables / 2
    gone = table if 2 * (local.parameters - table) >= most else 0.0
    return min(local.parameters - gone, most - local.layer / 8)


def _tensor(shape: Shape, layout: Layout, cluster: Cluster, fitted: Fitted) -> list[Exchange]:
    """Of tensor parallel ranks: an all-reduce for every sub-layer, forward and backward (Shoeybi et al. 2019, section
    3), and again where the layer is computed again; split in two where positions are shared between (Korthikanti et
    al. 2022, section 4.2.2), which sends as much."""
    if layout.tensor == 1:
        return []
    group = Group.of(layout.tensor, 1, cluster, fitted)
    width = 4.0 if layout.precision == "fp32" else 2.0
    again = 0.0
    if layout.recompute == "full":
        again = (0.5 if layout.system.early_stop else 1.0) / layout.recompute_every
    size = calls = 0.0
    for stack in stacks(shape, layout):
        own = stack.layers / layout.pipeline
        number = own * (3 if stack.memory else 2) * (2 + again)
        size += number * stack.positions * shape.d_model * width
        if layout.system.gate_apart:  # each projection sums its input's gradient: the gate's, keys' and values' too
            more = stack.positions * shape.gated + stack.memory_positions
            size += own * more * shape.d_model * width
            number += own * (shape.gated + (stack.memory > 0))
        calls += number
    size, calls = size * layout.accumulation, calls * layout.accumulation
    sent = 2 * size * (group.ranks - 1) / group.ranks
    inputs = {"sub-layers": calls, "bytes": size, "n": float(group.ranks), "bandwidth": group.bandwidth}
    formula = "2 x bytes of all sub-layers' results x (n - 1) / n / bandwidth + 2 x sub-layers x (n - 1) x hop"
    seconds = group.all_reduce(size, calls)
    return [Exchange("all-reduce of sub-layers", group.link, seconds, sent, False, formula, inputs)]


def _sequence(shape: Shape, layout: Layout, cluster: Cluster, fitted: Fitted) -> list[Exchange]:
    """Of sequence parallel ranks: four all-to-alls an attention, forward and backward (Jacobs et al. 2023, section 3);
    of context parallel ones: keys and values pass around a ring (Liu et al. 2023)."""
    found = []
    width = 4.0 if layout.precision == "fp32" else 2.0
    passes = 2 + (1.0 / layout.recompute_every if layout.recompute == "full" else 0.0)
    for kind, ranks in (("all-to-all of heads", layout.sequence), ("ring of keys and values", layout.context)):
        if ranks == 1:
            continue
        group = Group.of(ranks, layout.tensor * (1 if ranks == layout.sequence else layout.sequence), cluster, fitted)
        numbers = calls = 0.0
        for stack in stacks(shape, layout):
            own = stack.layers / layout.pipeline * passes
            if kind.startswith("ring"):
                numbers += own * stack.positions * 2 * shape.kv_size * ranks
            else:
                numbers += own * stack.positions * 2 * (shape.query_size + shape.kv_size)
                if stack.memory:
                    numbers += own * 2 * shape.query_size * (stack.positions + stack.memory_positions)
            calls += own * (8 if stack.memory else 4)
        size = numbers * width / layout.tensor * layout.accumulation
        inputs = {"bytes": size, "n": float(ranks), "bandwidth": group.bandwidth}
        seconds = group.scatter(size, calls * layout.accumulation / max(1, ranks - 1))
        sent, formula = size * (ranks - 1) / ranks, "bytes of heads x (n - 1) / n / bandwidth"
        found.append(Exchange(kind, group.link, seconds, sent, kind.startswith("ring"), formula, inputs))
    return found


def _pipeline(shape: Shape, layout: Layout, cluster: Cluster, fitted: Fitted) -> list[Exchange]:
    """Between pipeline stages: what passes a border, forward and backward, for each piece of the model (Narayanan et
    al. 2021, section 2.2.2); tensor parallel ranks each send their part (scatter/gather, section 4.1)."""
    if layout.pipeline == 1:
        return []
    group = Group.of(2, layout.ranks // layout.pipeline, cluster, fitted)
    positions = sum(stack.positions for stack in stacks(shape, layout))
    size = 2 * 2.0 * positions * shape.d_model * layout.interleave * layout.accumulation / layout.tensor
    calls = 2 * layout.interleave * layout.accumulation
    bandwidth = min(cluster.within_bandwidth, cluster.between_bandwidth) * fitted.link
    bandwidth = bandwidth if group.link == "between" else group.bandwidth
    inputs = {"bytes": size, "bandwidth": bandwidth, "borders": float(layout.interleave)}
    seconds = size / bandwidth + calls * group.hop_seconds
    formula = "2 x positions x d_model x 2 bytes x pieces / tensor ranks / bandwidth"
    return [Exchange("point-to-point of stages", group.link, seconds, size, False, formula, inputs)]
