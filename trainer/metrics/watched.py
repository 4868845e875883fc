"""A run as it goes on, in words: what the live view and the plain lines both tell. The clock is given."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from trainer.metrics import RunInfo, StepInfo
from trainer.wording import amount, short_number

_BARS = "▁▂▃▄▅▆▇█"
_KEPT = 256
"""Points that a trend keeps, of any number of steps."""

_MUCH_WAITING, _MUCH_PADDING, _MUCH_MEMORY, _SLOW = 0.2, 0.4, 1.1, 0.8
"""Shares of a step and of positions, and multiples of what was predicted, that deserve a look."""

_RECENT = 10
"""Logged steps whose pace is the present one."""

_FEW = 8
"""Ranks whose memory is told one by one."""


@dataclass(frozen=True, slots=True)
class Words:
    """A fact; `alarm`: it deserves a look."""

    text: str
    alarm: bool = False


class Trend:
    """The history of a number: means of ever longer stretches, so that a run of any length takes the same room."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._each = 1
        self._waiting: list[float] = []

    def add(self, value: float) -> None:
        """The newest value; one that is not finite leaves no trace."""
        if not math.isfinite(value):
            return
        self._waiting.append(value)
        if len(self._waiting) == self._each:
            self._means.append(_mean(self._waiting))
            self._waiting = []
        if len(self._means) == _KEPT:
            self._means = [_mean(pair) for pair in zip(self._means[::2], self._means[1::2], strict=True)]
            self._each *= 2

    def sparkline(self, width: int) -> str:
        """The whole history in at most `width` characters."""
        return sparkline([*self._means, *([_mean(self._waiting)] if self._waiting else [])], width)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def sparkline(values: Sequence[float], width: int) -> str:
    """Finite values in at most `width` characters: the mean of each stretch, between the lowest and the highest but for
    those of the first fifth, where a loss falls so far that nothing else would be seen."""
    stretches = min(width, len(values))
    edges = [len(values) * place // stretches for place in range(stretches + 1)] if stretches > 0 else []
    means = [_mean(values[a:b]) for a, b in pairwise(edges)]
    if not means:
        return ""
    low, high = min(means), max(means[len(means) // 5 :])
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[min(round((mean - low) * scale), len(_BARS) - 1)] for mean in means)


class WatchedRun:
    """What a person who watches wants to know, from the steps that were logged so far."""

    def __init__(self, run: RunInfo, clock: Callable[[], float]) -> None:
        """clock: seconds."""
        self._run = run
        self._clock = clock
        self._opened_at = clock()
        self._first: tuple[StepInfo, float] | None = None
        self._trained_seconds = 0.0
        self._pace: deque[tuple[float, int]] = deque(maxlen=_RECENT)
        self._memory: Mapping[str, int] = {}
        self.info: StepInfo | None = None
        self.losses = Trend()
        self.rates = Trend()

    def log(self, info: StepInfo) -> None:
        """The facts of a step."""
        if self.info is None:
            self._first = info, self._clock()
            self._pace.append((info.step_seconds, 1))
        else:
            seconds, steps = info.step_seconds * (info.step - self.info.step), info.step - self.info.step
            self._trained_seconds += seconds
            self._pace.append((seconds, steps))
        self.info = info
        self._memory = info.memory_by_rank or self._memory
        self.losses.add(info.loss)
        self.rates.add(info.tokens_per_second)

    @property
    def elapsed_seconds(self) -> float:
        """Since this start."""
        return self._clock() - self._opened_at

    @property
    def share(self) -> float:
        """How much of the run is done, 0 to 1, by the nearest of its ends that steps, tokens and epochs tell."""
        if self.info is None:
            return self._run.first_step / self._run.total_steps if self._run.total_steps else 0.0
        ends = (self.info.step, self._run.total_steps), *self._other_ends(self.info)
        return min(1.0, max((done / whole for done, whole in ends if whole), default=0.0))

    def _other_ends(self, info: StepInfo) -> Iterator[tuple[float, float | None]]:
        stop = self._run.config.get("stop", {})
        yield info.tokens, stop.get("tokens")
        yield info.epoch, stop.get("epochs")

    @property
    def left_seconds(self) -> float | None:
        """To the end at the present pace, evaluations and saves as they were so far; None before the first step."""
        if self.info is None or self._first is None or not self.share:
            return None
        pace = sum(seconds for seconds, _ in self._pace) / max(1, sum(steps for _, steps in self._pace))
        left = self.info.step * (1 - self.share) / self.share * pace
        since_first = self._clock() - self._first[1]
        return left * max(1.0, since_first / self._trained_seconds if self._trained_seconds else 1.0)

    def rows(self) -> dict[str, list[Words]]:
        """All facts of the newest step that there are, by what they are about."""
        rows = (self.speed, self.update, self.gradient, self.data, self.mixture, self.memory)
        return {row.__name__: words for row in rows if (words := row())}

    def speed(self) -> list[Words]:
        """Target tokens a second beside the prediction, and where the time of a step goes."""
        info = self._known()
        predicted = self._run.plan.get("predicted_step_seconds")
        pace = predicted / info.step_seconds if predicted and info.step_seconds else None
        waiting = info.loader_wait_seconds / info.step_seconds if info.step_seconds else 0.0
        words = [Words(f"{info.tokens_per_second:,.0f} target tokens/s")]
        if pace is not None:
            words.append(Words(f"{100 * pace:.0f} % of {info.tokens_per_second / pace:,.0f} predicted", pace < _SLOW))
        words.append(Words(f"{info.step_seconds:.3g} s a step"))
        if info.mfu is not None:
            words.append(Words(f"MFU {100 * info.mfu:.1f} %"))
        return [*words, Words(f"{100 * waiting:.0f} % waiting for data", waiting > _MUCH_WAITING)]

    def update(self) -> list[Words]:
        """Learning rate, the norm of the gradient, steps without an update."""
        info = self._known()
        norm = Words(f"gradient {info.grad_norm:.2f}", not math.isfinite(info.grad_norm))
        skipped = [Words(f"skipped {info.skipped_steps}", alarm=True)] if info.skipped_steps else []
        return [Words(f"lr {info.lr:.2e}"), norm, *skipped]

    def gradient(self) -> list[Words]:
        """The norm by group of layers; of many groups the first."""
        norms = self._known().norms
        words = [Words(f"{name} {norm:.2g}") for name, norm in list(norms.items())[:_FEW]]
        return words + ([Words(f"and {len(norms) - _FEW} more")] if len(norms) > _FEW else [])

    def data(self) -> list[Words]:
        """How far the data are read and how healthy they are: padding, records not used."""
        info = self._known()
        unused = [Words(f"{name} {count:,}", name == "bad_record") for name, count in info.data.items() if count]
        return [
            Words(f"epoch {info.epoch:.2f}"),
            Words(f"{info.tokens:,} tokens"),
            Words(f"padding {100 * info.padding_fraction:.1f} %", info.padding_fraction > _MUCH_PADDING),
            *unused,
        ]

    def mixture(self) -> list[Words]:
        """The share of each source, of late."""
        return [Words(f"{source} {100 * share:.1f} %") for source, share in self._known().mixture.items()]

    def memory(self) -> list[Words]:
        """The peak of the largest rank beside the prediction, and of the others."""
        info = self._known()
        predicted = self._run.plan.get("predicted_memory_bytes")
        high = predicted is not None and info.memory_bytes > _MUCH_MEMORY * predicted
        words = [Words(f"peak {amount(info.memory_bytes)}", high)]
        if predicted is not None:
            words.append(Words(f"{amount(predicted)} predicted"))
        if 1 < len(self._memory) <= _FEW:
            words.append(Words("by rank " + ", ".join(amount(size) for size in self._memory.values())))
        elif self._memory:
            ordered = sorted(self._memory, key=self._memory.__getitem__)
            ends = (f"{amount(self._memory[rank])} (rank {rank})" for rank in (ordered[0], ordered[-1]))
            words += [Words(f"ranks from {' to '.join(ends)}")] if len(ordered) > 1 else []
        return words

    def _known(self) -> StepInfo:
        assert self.info is not None, "a step was logged"
        return self.info


def evaluation_words(metrics: Mapping[str, float | str]) -> str:
    """`loss 2.5  bleu 21.3`."""
    return "  ".join(f"{name.removeprefix('eval/')} {short_number(value)}" for name, value in metrics.items())
