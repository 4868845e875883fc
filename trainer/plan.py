"""All batch arithmetic: configuration + world size -> one frozen `RunPlan`. Pure; imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.config import Config


@dataclass(frozen=True, slots=True)
class RunPlan:
    """How a global batch is split. All sizes in samples.

    world_size = data_parallel x sequence_parallel x tensor_parallel: ranks that share sequences or matrices work on the
    same samples. global_size = rank_size x data_parallel, and, unless `micro_tokens` rules, rank_size = micro_size x
    accumulation. With a token budget the number of micro-batches varies by step; `micro_size` and `accumulation` are
    then None.
    """

    world_size: int
    global_size: int
    rank_size: int
    micro_size: int | None
    accumulation: int | None
    micro_tokens: int | None
    precision: str
    engine: str
    zero_stage: int
    offload_optimizer: str
    offload_parameters: str
    clip_norm: float | None
    nvme_path: str | None = None
    sequence_parallel: int = 1
    tensor_parallel: int = 1

    @property
    def data_parallel(self) -> int:
        """Groups of ranks that work on samples of their own."""
        return self.world_size // (self.sequence_parallel * self.tensor_parallel)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for plan.json and for people."""
        return {**asdict(self), "data_parallel": self.data_parallel}


def nearest_multiples(value: int, divisor: int) -> list[int]:
    """The positive multiples of `divisor` next to `value` (below and above)."""
    below = value // divisor * divisor
    return [multiple for multiple in (below, below + divisor) if multiple > 0]


def _data_parallel(config: Config, world_size: int) -> int:
    """Groups of ranks that work on samples of their own."""
    engine = config.engine
    each = engine.sequence_parallel * engine.tensor_parallel
    if world_size % each:
        raise ConfigError(
            f"engine.sequence_parallel={engine.sequence_parallel} x engine.tensor_parallel={engine.tensor_parallel}"
            f" does not divide the {world_size} ranks; start a multiple of {each} ranks, or lower one of them."
        )
    return world_size // each


def _either(values: list[int]) -> str:
    return " or ".join(map(str, values))


def make_plan(config: Config, world_size: int) -> RunPlan:
    """Derive the split of the global batch over `world_size` ranks.

    Raises ConfigError with the number that does not fit and the nearest that do.
    """
    batch = config.batch
    if batch.micro_size is not None and batch.micro_tokens is not None:
        raise ConfigError(
            f"batch.micro_size={batch.micro_size} and batch.micro_tokens={batch.micro_tokens} are both set;"
            " set one of them to null."
        )
    data_parallel = _data_parallel(config, world_size)
    ranks = "ranks" if data_parallel == world_size else "groups of ranks"
    rank_size, rest = divmod(batch.global_size, data_parallel)
    micro_size = None if batch.micro_tokens is not None else batch.micro_size or rank_size
    if rest:
        nearest = _either(nearest_multiples(batch.global_size, data_parallel * (batch.micro_size or 1)))
        raise ConfigError(
            f"batch.global_size={batch.global_size} does not divide over {data_parallel} {ranks}"
            f"{f' x batch.micro_size={batch.micro_size}' if batch.micro_size else ''};"
            f" use batch.global_size={nearest}."
        )
    if micro_size is not None and rank_size % micro_size:
        divisors = (size for size in range(1, rank_size + 1) if rank_size % size == 0)
        micro_sizes = sorted(sorted(divisors, key=lambda size: abs(size - micro_size))[:2])
        global_sizes = nearest_multiples(batch.global_size, data_parallel * micro_size)
        raise ConfigError(
            f"batch.micro_size={micro_size} does not divide the {rank_size} samples of each rank"
            f" (batch.global_size={batch.global_size} / {data_parallel} {ranks});"
            f" use batch.micro_size={_either(micro_sizes)}, or batch.global_size={_either(global_sizes)}."
        )
    zero = config.engine.kind == "zero"
    offloads = (str(config.engine.offload_optimizer), str(config.engine.offload_parameters))
    return RunPlan(
        world_size=world_size,
        global_size=batch.global_size,
        rank_size=rank_size,
        micro_size=micro_size,
        accumulation=None if micro_size is None else rank_size // micro_size,
        micro_tokens=batch.micro_tokens,
        precision=str(config.precision),
        engine=str(config.engine.kind),
        zero_stage=config.engine.stage if zero else 0,
        offload_optimizer=offloads[0],
        offload_parameters=offloads[1],
        clip_norm=config.clip_norm,
        nvme_path=f"{config.engine.nvme_path}/{config.name}" if "nvme" in offloads else None,
        sequence_parallel=config.engine.sequence_parallel,
        tensor_parallel=config.engine.tensor_parallel,
    )
