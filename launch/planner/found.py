"""What a search for settings finds: candidates, and what cannot be or does not fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainer.config import ActivationOffload, Config, EngineConfig, EngineKind, Offload, Recompute
from trainer.estimate import Prediction


@dataclass(frozen=True, slots=True)
class Candidate:
    """A configuration that the trainer takes, and what is predicted of it."""

    config: Config
    prediction: Prediction

    @property
    def arrangement(self) -> str:
        """Which ranks hold what, and where: `ZeRO-3, tensor 2, optimizer in host memory`."""
        return arrangement(self.config.engine)

    @property
    def saving(self) -> str:
        """What becomes of activations until the backward pass: `recomputed (full)`."""
        engine, words = self.config.engine, []
        if engine.recompute != Recompute.none:
            words.append(f"recomputed ({engine.recompute})")
        if engine.offload_activations != ActivationOffload.none:
            words.append("in host memory")
        return ", ".join(words) or "kept"

    @property
    def micro(self) -> str:
        """What a rank passes forward at once."""
        batch = self.config.batch
        return f"{batch.micro_size} samples" if batch.micro_tokens is None else f"{batch.micro_tokens:,} tokens"

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.prediction.step_seconds.value

    @property
    def extras(self) -> tuple[int, int]:
        """How far from plain the settings are; sorts."""
        engine = self.config.engine
        unusual = [
            engine.offload_optimizer != Offload.none,
            engine.offload_parameters != Offload.none,
            engine.offload_activations != ActivationOffload.none,
            engine.recompute != Recompute.none,
            engine.tensor_parallel > 1,
            engine.sequence_parallel > 1,
        ]
        return sum(unusual), engine.stage


@dataclass(frozen=True, slots=True)
class Failure:
    """An arrangement that cannot be, or does not fit, and why. excess: how many times what there is it would need."""

    engine: EngineConfig
    reason: str
    excess: float

    @property
    def family(self) -> str:
        """The arrangement without how many ranks share matrices and positions."""
        alone = self.excess < float("inf")
        return arrangement(replace(self.engine, tensor_parallel=1, sequence_parallel=1) if alone else self.engine)


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found. best: the fastest that fits, of those alike the plainest: with the upper end of its error
    bar or, `narrowly`, only with the predicted value; runners_up: the fastest of every other arrangement; tried:
    predictions made."""

    best: Candidate
    narrowly: bool
    runners_up: tuple[Candidate, ...]
    failures: tuple[Failure, ...]
    tried: int


def arrangement(engine: EngineConfig) -> str:
    """See `Candidate.arrangement`."""
    words = [f"ZeRO-{engine.stage}" if engine.kind == EngineKind.zero else "plain"]
    words += [f"tensor {engine.tensor_parallel}"] if engine.tensor_parallel > 1 else []
    words += [f"sequence {engine.sequence_parallel}"] if engine.sequence_parallel > 1 else []
    if engine.offload_optimizer != Offload.none:
        words.append("optimizer in host memory" if engine.offload_optimizer == Offload.cpu else "optimizer on disk")
    if engine.offload_parameters != Offload.none:
        words.append("parameters in host memory")
    return ", ".join(words)
