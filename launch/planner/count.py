"""A second opinion: the real model and engine take a step without memory and other ranks, and everything is counted.

    python -m launch.planner.count experiment=decoder_7b_zero3 world_size=64
    python -m launch.planner.count experiment=quickstart engine=zero2 world_size=8 device=cpu --json

Models, engines and DeepSpeed run as they are, under PyTorch's fake tensors and fake process group (`fakes`), as rank 0;
`ledger` counts. So it shares no formula with `trainer.estimate`: only the sizes of micro-batches and sequences. What it
cannot see: how an allocator rounds and fragments, what kernels and libraries take for themselves, and, on a CPU, pages
that nobody writes to. DeepSpeed runs as on a CPU, without streams, where collectives overlap nothing.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING, Any, Literal

from trainer.errors import ConfigError, UserError

if TYPE_CHECKING:
    import torch

    from launch.planner.ledger import Collective, Ledger
    from trainer.config import Config
    from trainer.estimate.layout import Layout as Run

Device = Literal["gpu", "cpu"]

HELP = """python -m launch.planner.count experiment=... [key=value ...] [world_size=N] [device=gpu|cpu] [--json]

Runs a step of the experiment on rank 0 of N, with tensors that have no memory, and prints what it allocates and sends.
device=gpu (default): with the kernels that models take on a GPU. Takes seconds to minutes and about 1 GB.
"""


@dataclass(frozen=True)
class Count:
    """What one rank holds and sends.

    peak_bytes: most bytes of tensors at once, in `phase`; peak: by kind, to 0.5 %. held: bytes between steps, by kind.
    host: bytes that lie in host memory by offloading. sent: collectives of one step as (kind, bytes of the whole
    tensor, ranks, how many).
    """

    ranks: int
    peak_bytes: int
    phase: str
    peak: dict[str, int]
    held: dict[str, int]
    host: dict[str, int]
    sent: list[tuple[str, int, int, float]]

    @property
    def sent_bytes(self) -> float:
        """Of a step, as docs/sharding.md counts them: an all-reduce passes its tensor twice."""
        return sum((2 if "allreduce" in kind else 1) * size * times for kind, size, _, times in self.sent)


def count(config: Config, ranks: int, device: Device = "gpu") -> Count:
    """A step of `config` on rank 0 of `ranks`. Raises ConfigError for what it cannot count."""
    from launch.planner import fakes
    from launch.planner.ledger import Ledger
    from trainer.estimate import layout_of
    from trainer.parallel.layout import make_layout
    from trainer.parts import make_engine
    from trainer.plan import make_plan

    _check(config)
    run = layout_of(config, ranks)
    plan = make_plan(config, ranks)
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(StringIO()))  # DeepSpeed's own measurements
        stack.enter_context(fakes.one_of_many(ranks))
        stack.enter_context(fakes.without_values())
        if device == "gpu":
            stack.enter_context(fakes.kernels_of_a_gpu())
        if plan.engine == "zero":
            from trainer.engine.zero import trusting_ranks

            stack.enter_context(trusting_ranks())
        ledger = stack.enter_context(Ledger(run.target_fraction))
        layout = make_layout(plan.sequence_parallel, plan.tensor_parallel)
        engine = make_engine(config, plan, partial(_build, config), layout)
        return _count_step(config, run, engine, layout, ledger)


def _build(config: Config) -> Any:
    from trainer.build import build

    return build(config.model, "model")


def _count_step(config: Config, run: Run, engine: Any, layout: Any, ledger: Ledger) -> Count:
    """The second step is counted: in the first, optimizer states come to be and ZeRO-3 learns the order of layers. Of
    equal micro-batches before the last, one is run."""
    from trainer.parallel.sequence import own_part

    task = _Loss(ledger, config.task.get("label_smoothing", 0.0), config.task.get("z_loss", 0.0))
    with ledger.during("batch"):
        batch = own_part(_batch(config, run), layout)

    def learn(last: bool) -> None:
        with ledger.during("backward"):  # but for what `_Loss` tells otherwise
            engine.forward_backward(task, batch, 1.0, last)

    def update() -> None:
        with ledger.during("update"):
            engine.step(1e-3)

    ledger.owners = partial(_owners, engine)
    learn(last=True)
    update()
    host = ledger.leave_out(_offloaded(run))
    held = ledger.kinds()
    ledger.begin()
    if run.accumulation > 1:
        learn(last=False)
    before, ledger.collectives = ledger.collectives, []
    learn(last=True)
    update()
    sent: Counter[Collective] = Counter(ledger.collectives)
    for collective in before:
        sent[collective] += run.accumulation - 1  # type: ignore[assignment]
    rows = [(one.kind, one.num_bytes, one.ranks, float(times)) for one, times in sent.items()]
    return Count(run.ranks, ledger.peak.num_bytes, ledger.peak.phase, ledger.peak.kinds, held, host, sorted(rows))


class _Loss:
    """A task's loss over its positions; tells the ledger where it is."""

    def __init__(self, ledger: Ledger, label_smoothing: float, z_loss: float) -> None:
        self._ledger, self._label_smoothing, self._z_loss = ledger, label_smoothing, z_loss

    def loss(self, model: Any, batch: Mapping[str, torch.Tensor]) -> Any:
        """See `trainer.tasks.loss.token_loss`."""
        from trainer.cross_entropy import Targets
        from trainer.tasks import LossSums
        from trainer.tasks.loss import cross_entropy_sums

        labels, smoothing, z_loss = batch["labels"], self._label_smoothing, self._z_loss

        def head_loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            with self._ledger.during("loss"):
                return Targets(labels, smoothing, z_loss)(hidden, weight, bias)

        with self._ledger.during("forward"):
            if getattr(model, "fuses_loss", False):
                sums = model(batch, head_loss=head_loss)
                return LossSums(sums[0], sums[1].detach(), (labels >= 0).sum(), sums[2].detach())
            logits = model(batch)
        with self._ledger.during("loss"):
            return cross_entropy_sums(logits, labels, smoothing, z_loss)


def _batch(config: Config, run: Run) -> dict[str, torch.Tensor]:
    """A micro-batch of full rows, as the tasks of the three Transformers collate it."""
    import torch

    rows, source, target = max(1, round(run.micro_size)), run.source_length, run.target_length
    packed = config.data.get("batching") == "packed"

    def ids(length: int) -> torch.Tensor:
        return torch.zeros(rows, length, dtype=torch.int64)

    if not target:
        batch = {"input_ids": ids(source), "attention_mask": ids(source).bool(), "labels": ids(source)}
        return batch | ({"segment_ids": ids(source), "position_ids": ids(source)} if packed else {})
    if not source:
        batch = {"input_ids": ids(target), "attention_mask": ids(target).bool(), "labels": ids(target)}
        return batch | ({"segment_ids": ids(target), "position_ids": ids(target)} if packed else {})
    batch = {"source_ids": ids(source), "source_mask": ids(source).bool()}
    batch |= {"decoder_input_ids": ids(target), "labels": ids(target)}
    if packed:
        batch |= {f"source_{name}": ids(source) for name in ("segment_ids", "position_ids")}
        batch |= {f"target_{name}": ids(target) for name in ("segment_ids", "position_ids")}
    return batch


_COUNTED = ("trainer.models.decoder.", "trainer.models.encoder.", "trainer.models.encoder_decoder.")


def _check(config: Config) -> None:
    """Raise ConfigError for what cannot be counted."""
    target, problems = config.model["_target_"], []
    if not target.startswith(_COUNTED) or config.model.get("head", "masked_lm") != "masked_lm":
        problems.append(f"model={target}: only decoders, encoder-decoders and masked language models can be counted.")
    if config.precision == "fp16":
        problems.append("precision=fp16 cannot be counted without a GPU; count precision=bf16, which is as large.")
    if "nvme" in (config.engine.offload_optimizer, config.engine.offload_parameters):
        problems.append("engine.offload_optimizer=nvme cannot be counted; count engine.offload_optimizer=cpu.")
    if config.engine.compile:
        problems.append("engine.compile=true cannot be counted; count engine.compile=false.")
    if config.privacy.noise_multiplier is not None:
        problems.append("privacy.noise_multiplier cannot be counted; set it to null.")
    if problems:
        raise ConfigError(*problems)


def _offloaded(run: Run) -> frozenset[str]:
    kinds = {"masters", "optimizer states", "gradients"} if run.offload_optimizer == "cpu" else set()
    return frozenset(kinds | ({"parameters"} if run.offload_parameters == "cpu" else set()))


def _owners(engine: Any) -> dict[int, str]:
    """The kind of each storage that the engine holds, by its key; the first that applies."""
    import torch

    from launch.planner.ledger import key_of

    kinds: dict[int, str] = {}

    def mark(kind: str, tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
            kinds.setdefault(key_of(tensor), kind)

    hanging = list(hanging_on(engine))
    for name, tensor in hanging:
        if name == "buffer":  # of DeepSpeed's buckets, of which gradients of parameters are views for a while
            mark("buffers of collectives", tensor)
    for parameter in engine.module.parameters():
        mark("parameters", getattr(parameter, "ds_tensor", parameter))
    for parameter in engine.module.parameters():
        mark("gathered parameters", parameter)
        mark("gradients", parameter.grad)
    optimizer: Any = getattr(engine, "_base_optimizer", None) or engine._optimizer
    for state in optimizer.state.values():
        for tensor in state.values():
            mark("optimizer states", tensor)
    for group in optimizer.param_groups:
        for master in group["params"]:
            mark("masters", master)
            mark("gradients", master.grad)
    for name, tensor in hanging:
        told = name.lower()
        if "grad" in told or "_sum" in told:
            mark("gradients", tensor)
        else:
            mark("masters" if "fp32" in told or "master" in told else "other", tensor)
    return kinds


def hanging_on(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Tensors in an object's attributes and their containers, with the last attribute's name."""
    import torch

    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for part in list(value.values()):
            yield from hanging_on(part, name, depth)
    elif isinstance(value, list | tuple | set):
        for part in list(value):
            yield from hanging_on(part, name, depth)
    elif depth < 3 and hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module | type):
        for attribute, part in list(vars(value).items()):
            yield from hanging_on(part, attribute, depth + 1)


def table(found: Count) -> str:
    """One kind a line, largest first, and collectives below."""
    from trainer.wording import amount

    lines = [f"rank 0 of {found.ranks}; peak {amount(found.peak_bytes)} in the {found.phase} phase"]
    for title, kinds in (("at the peak", found.peak), ("between steps", found.held), ("in host memory", found.host)):
        if kinds:
            lines.append(title)
            for kind, size in sorted(kinds.items(), key=lambda pair: -pair[1]):
                lines.append(f"  {kind:<24} {amount(size):>10}")
    lines.append("collectives of a step (whole tensor x times, ranks)")
    grouped: Counter[tuple[str, int]] = Counter()
    times: Counter[tuple[str, int]] = Counter()
    for kind, size, ranks, number in found.sent:
        grouped[kind, ranks] += round(size * number)
        times[kind, ranks] += round(number)
    for (kind, ranks), size in sorted(grouped.items(), key=lambda pair: -pair[1]):
        lines.append(f"  {kind:<24} {amount(size):>10}  in {times[kind, ranks]:,}, of {ranks} ranks")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    from trainer.build import part_problems
    from trainer.composition import compose
    from trainer.config import to_config

    words = list(arguments)
    if not words or {"--help", "-h"} & set(words):
        print(HELP, end="")
        return 0
    try:
        own = {key: _taken(words, key) for key in ("world_size", "device")}
        as_json = "--json" in words
        config = to_config(compose([word for word in words if word != "--json"]), part_problems)
        found = count(config, _ranks(own["world_size"]), _device(own["device"]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps({**asdict(found), "sent_bytes": found.sent_bytes}) if as_json else table(found))
    return 0


def _taken(words: list[str], key: str) -> str | None:
    """The value of `key` among the words, which are left without it."""
    given = [word for word in words if word.startswith(f"{key}=")]
    for word in given:
        words.remove(word)
    return given[-1].partition("=")[2] if given else None


def _ranks(given: str | None) -> int:
    if given is None:
        return 1
    if not given.isdigit() or int(given) < 1:
        raise ConfigError(f"world_size={given} is not a whole number above 0.")
    return int(given)


def _device(given: str | None) -> Device:
    if given not in (None, "gpu", "cpu"):
        raise ConfigError(f"device={given} is not known; use gpu or cpu.")
    return "cpu" if given == "cpu" else "gpu"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
