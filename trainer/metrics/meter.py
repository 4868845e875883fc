"""Measurements -> StepInfo. Pure arithmetic; the clock is given, so tests need no waiting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from trainer.metrics import StepInfo
from trainer.state import TrainState

# Dense bf16 matrix product, FLOP/s, by a word in the device's name (vendors' data sheets, without sparsity).
PEAK_FLOPS = {"V100": 125e12, "A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "MI300X": 1307e12}

_GROWTH = 1.01
"""A rank's peak of memory is told again when it is higher by this factor: a few lines of a long run."""

_RANKS = 64
"""Of more ranks, so many are told, evenly spaced, and the one that holds most."""


def peak_flops(device_name: str) -> float | None:
    """The peak of the device with this name, FLOP/s; None where we know none (any CPU)."""
    return next((peak for word, peak in PEAK_FLOPS.items() if word in device_name), None)


class Meter:
    """Collects one rank's measurements between two logged steps; `report` closes the interval.

    Sums given to `report` are over all ranks; what is collected here is this rank's, and times are taken as every
    rank's, since ranks step together.
    """

    def __init__(self, clock: Callable[[], float], peak_flops_per_second: float | None) -> None:
        self._clock = clock
        self._peak = peak_flops_per_second
        self._told_memory: Sequence[int] = ()
        self._begin()

    def _begin(self) -> None:
        self._since = self._clock()
        self._steps = 0
        self._tokens = 0
        self._wait_seconds = 0.0
        self.positions = 0
        self.padding = 0
        self.flops = 0.0
        self.drawn: Counter[str] = Counter()

    def step_done(
        self,
        tokens: int,
        positions: int,
        padding: int,
        wait_seconds: float,
        flops: float,
        drawn: Mapping[str, int] | None = None,
    ) -> None:
        """One optimizer step: target tokens of the *global* batch; this rank's positions, padding, wait for data, model
        FLOPs and what it drew of each source of a mixture."""
        self._steps += 1
        self._tokens += tokens
        self.positions += positions
        self.padding += padding
        self._wait_seconds += wait_seconds
        self.flops += flops
        self.drawn.update(drawn or {})

    def pause(self, seconds: float) -> None:
        """Leave out `seconds` that went into evaluation or saving."""
        self._since += seconds

    def report(
        self,
        state: TrainState,
        *,
        loss: float,
        grad_norm: float,
        lr: float,
        target_tokens: int,
        positions: float,
        padding: float,
        flops: float,
        memory: Sequence[int],
        skipped_steps: int,
        data: Mapping[str, int],
        norms: Mapping[str, float],
        drawn: Mapping[str, float],
    ) -> StepInfo:
        """The facts of the interval that ends now; positions, padding, flops and drawn are sums over all ranks; memory:
        the peak of each rank."""
        seconds = max(self._clock() - self._since, 1e-9)
        steps = max(self._steps, 1)
        info = StepInfo(
            step=state.step,
            tokens=state.tokens,
            samples=state.samples,
            epoch=round(state.epoch, 4),
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            step_seconds=seconds / steps,
            tokens_per_second=self._tokens / seconds,
            target_tokens=target_tokens,
            padding_fraction=padding / positions if positions else 0.0,
            loader_wait_seconds=self._wait_seconds / steps,
            mfu=None if self._peak is None else flops / seconds / (self._peak * len(memory)),
            memory_bytes=max(memory),
            skipped_steps=skipped_steps,
            data=data,
            norms=norms,
            mixture={source: part / (sum(drawn.values()) or 1.0) for source, part in drawn.items()},
            memory_by_rank=self._grown(memory),
        )
        self._begin()
        return info

    def _grown(self, memory: Sequence[int]) -> dict[str, int]:
        """The peaks by rank if one has grown; a start tells them at once."""
        before = self._told_memory or (0,) * len(memory)
        if not any(now > _GROWTH * then for now, then in zip(memory, before, strict=True)):
            return {}
        self._told_memory = memory
        told = {*range(0, len(memory), -(-len(memory) // _RANKS)), max(range(len(memory)), key=memory.__getitem__)}
        return {str(rank): memory[rank] for rank in sorted(told)}
