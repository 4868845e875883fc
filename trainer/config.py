"""The schema of every closed fact, and the strict way from Hydra's composition to a frozen `Config`.

Facts are dataclasses; a key that is not here is an error with a suggestion. Parts (model, task, data, tokenizer, optimizer,
schedule, logging) are mappings with a `_target_`; `trainer.build` binds them to the target's signature.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING


class Precision(StrEnum):
    """Number format of parameters, activations and gradients; masters and optimizer states are always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Resume(StrEnum):
    """What to do with a run directory of the same name: refuse it, go on if there is a checkpoint, or insist on one."""

    never = "never"
    auto = "auto"
    must = "must"


class EngineKind(StrEnum):
    """`plain` is PyTorch alone; `zero` is DeepSpeed ZeRO."""

    plain = "plain"
    zero = "zero"


class Offload(StrEnum):
    """Where a sharded state lives when it is not in use."""

    none = "none"
    cpu = "cpu"


@dataclass(frozen=True)
class BatchConfig:
    """Samples per optimizer step over all ranks, and how much one rank passes forward at once."""

    global_size: int = MISSING
    micro_size: int | None = None  # samples; None: the whole share of a rank at once
    micro_tokens: int | None = None  # padded positions (source + target); instead of micro_size


@dataclass(frozen=True)
class LogConfig:
    """`every`: steps between two lines of metrics.jsonl and the console."""

    every: int = 10


@dataclass(frozen=True)
class EvalConfig:
    """When to evaluate on the validation split, and on how much of it."""

    every: int = 0  # steps; 0: only at the end
    max_samples: int | None = None
    generate: bool = True  # also decode (BLEU, chrF ...); costs far more than the loss
    final_split: str = "test"  # evaluated once at the end of the run: test, validation or none


@dataclass(frozen=True)
class StopConfig:
    """Ends of a run besides `steps`; the first to come true stops it and is named."""

    tokens: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    patience: int | None = None  # evaluations without improvement of the task's headline metric


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every: int = 0  # steps; 0: only at the end
    keep: int = 2


@dataclass(frozen=True)
class EngineConfig:
    """How the states are held: `kind=zero` shards them over the ranks by ZeRO `stage`."""

    kind: EngineKind = EngineKind.plain
    stage: int = 0
    offload_optimizer: Offload = Offload.none
    offload_parameters: Offload = Offload.none
    compile: bool = False


@dataclass(frozen=True)
class DebugConfig:
    """Switches for people who look for a fault."""

    traceback: bool = False


@dataclass(frozen=True)
class Config:
    """One run. Every value that scripts rely on is described in docs/configuration.md."""

    name: str = MISSING
    runs_dir: str = "runs"
    seed: int = 0
    steps: int = MISSING
    precision: Precision = Precision.bf16
    force_fp16: bool = False  # fp16 for model families known to overflow in it
    clip_norm: float | None = 1.0
    resume: Resume = Resume.auto
    batch: BatchConfig = field(default_factory=BatchConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    model: Any = MISSING
    task: Any = MISSING
    data: Any = MISSING
    tokenizer: Any = None
    optimizer: Any = MISSING
    schedule: Any = MISSING
    logging: Any = None
