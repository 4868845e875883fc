"""What `data` in a configuration names: the options of one data set or of a mixture of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from trainer.data.dataset import Dataset
from trainer.data.mixture import AtEnd, MixBy, Mixture
from trainer.data.order import Batching
from trainer.data.remote import Retries, set_retries
from trainer.errors import ConfigError
from trainer.wording import did_you_mean

OnBadRecord = Literal["skip", "fail"]


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """One of `data.sources`. weight: its share, or [[first step, share], ...]; at_end: see `AtEnd`; task: options that
    differ from `task` for its records; source: the `part` of a `Dataset`, and the rest as there."""

    path: str | None = None
    name: str | None = None
    format: str | None = None
    train: str | None = "train"
    validation: str | None = "validation"
    test: str | None = "test"
    weight: float | Sequence[Sequence[float]] = 1.0
    at_end: AtEnd = "repeat"
    task: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] | None = None

    @property
    def phases(self) -> list[tuple[int, float]]:
        """(first step, share), from step 0 on."""
        if isinstance(self.weight, int | float):
            return [(0, float(self.weight))]
        return [(int(first), float(share)) for first, share in self.weight]


class StreamData:
    """What `data` in a configuration names. `path` is one data set, `sources` a mixture of several."""

    def __init__(
        self,
        path: str | None = None,
        name: str | None = None,
        format: str | None = None,
        train: str | None = "train",
        validation: str | None = "validation",
        test: str | None = "test",
        sources: Mapping[str, Any] | None = None,
        mix_by: MixBy = "samples",
        lanes: int = 48,
        block: int = 512,
        shuffle: bool = True,
        batching: Batching = "bucketed",
        row_length: int | Sequence[int] | None = None,
        stages: Sequence[Mapping[str, Any]] = (),
        workers: int = 0,
        retry_seconds: float = 300,
        on_bad_record: OnBadRecord = "skip",
        max_bad_fraction: float = 0.01,
        trace: bool = False,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        """Nothing is opened yet. Raises ConfigError for values that cannot be.

        path to test: see `Dataset`; sources: `SourceOptions` by name; mix_by: what weights count; lanes: logical
        streams, which the ranks must divide; block: records of a lane that are shuffled and batched together; batching:
        see `Batching`; row_length: positions of a packed row, one number or one for each side, None = by the task;
        stages: parts, see `trainer.data.stages`; workers: processes of each rank that read and encode, 0 = a thread;
        retry_seconds: how long faults of servers are waited out, in this whole process; on_bad_record,
        max_bad_fraction: what follows a record that cannot be used, and how many may be skipped; trace:
        keep the ids of all samples; source: instead of path, a part that is a `trainer.data.sources.Source`.
        """
        least = {"lanes": (lanes, 1), "block": (block, 1), "workers": (workers, 0), "retry_seconds": (retry_seconds, 0)}
        problems = [f"data.{key}={value} must be at least {low}." for key, (value, low) in least.items() if value < low]
        if not 0 <= max_bad_fraction <= 1:
            problems.append(f"data.max_bad_fraction={max_bad_fraction} must lie between 0 and 1.")
        if [bool(path), bool(source), bool(sources)].count(True) != 1:
            given = f"data.path={path}, data.source={source} and data.sources={list(sources or {})}"
            problems.append(f"{given}: give one of the three.")
        if sources:
            self.sources = _source_options(sources, problems)
        else:
            self.sources = {"": SourceOptions(path, name, format, train, validation, test, source=source)}
        retries = Retries(total_seconds=retry_seconds)
        set_retries(retries)
        self.datasets = _datasets(self.sources, lanes, retries, problems)
        if problems:
            raise ConfigError(*problems)
        self.mix_by = mix_by
        self.lanes = lanes
        self.block = block
        self.shuffle = shuffle
        self.batching = batching
        self.row_length = row_length
        self.stages = stages
        self.workers = workers
        self.max_bad_fraction = max_bad_fraction if on_bad_record == "skip" else 0.0
        self.trace = trace

    def mixture(self, seed: int) -> Mixture:
        """How the sources are mixed."""
        options = list(self.sources.values())
        return Mixture(_phases([one.phases for one in options]), [one.at_end for one in options], self.mix_by, seed)


def _source_options(sources: Mapping[str, Any], problems: list[str]) -> dict[str, SourceOptions]:
    """The options of a mixture's sources; what is wrong with them goes to `problems`."""
    known = [entry.name for entry in fields(SourceOptions)]
    options: dict[str, SourceOptions] = {}
    for name, given in sources.items():
        key = f"data.sources.{name}"
        if not isinstance(given, Mapping) or not {"path", "source"} & set(given):
            problems.append(
                f"{key}={given} must be a mapping with path or source, and perhaps {', '.join(known[1:-1])}."
            )
        elif unknown := [entry for entry in given if entry not in known]:
            problems += [f"{key}.{entry} is no option of a source{did_you_mean(entry, known)}" for entry in unknown]
        else:
            found = _source_problems(key, one := SourceOptions(**given))
            options |= {} if found else {name: one}
            problems += found
    if len(options) == len(sources) and not problems:
        firsts = sorted({first for one in options.values() for first, _ in one.phases})
        problems += [
            f"data.sources: all weights are 0 from step {first} on; raise one."
            for first in firsts
            if not any(_share_at(first, one.phases) for one in options.values())
        ]
    return options


def _source_problems(key: str, options: SourceOptions) -> list[str]:
    texts = {name: getattr(options, name) for name in ("path", "name", "format", "train", "validation", "test")}
    problems = [
        f"{key}.{name}={value!r} is not a text or null."
        for name, value in texts.items()
        if not isinstance(value, str) and value is not None
    ]
    changes: Any = options.task
    if not isinstance(changes, Mapping):
        problems.append(f"{key}.task={changes!r} is not a mapping of options of the task.")
    if options.at_end not in get_args(AtEnd):
        problems.append(f"{key}.at_end={options.at_end} is not known; use {', '.join(get_args(AtEnd))}.")
    try:
        phases = options.phases
    except (TypeError, ValueError):
        phases = []
    firsts = [first for first, _ in phases]
    if not phases or firsts[0] != 0 or firsts != sorted(set(firsts)) or min(share for _, share in phases) < 0:
        problems.append(
            f"{key}.weight={options.weight} must be a number of 0 or more, or a list of [first step, number] in"
            " ascending order that begins at step 0."
        )
    return problems


def _datasets(
    sources: Mapping[str, SourceOptions], lanes: int, retries: Retries, problems: list[str]
) -> dict[str, Dataset]:
    datasets = {}
    for name, one in sources.items():
        splits = one.train, one.validation, one.test
        key = f"data.sources.{name}" if name else "data"
        try:
            datasets[name] = Dataset(key, one.path, one.name, one.format, *splits, lanes, retries, one.source)
        except ConfigError as error:
            problems += error.problems
    return datasets


def _phases(weights: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, tuple[float, ...]]]:
    """Weights of all sources, which sum to 1, from each step on at which one changes."""
    firsts = sorted({first for phases in weights for first, _ in phases})
    rows = [(first, [_share_at(first, phases) for phases in weights]) for first in firsts]
    return [(first, tuple(share / sum(shares) for share in shares)) for first, shares in rows]


def _share_at(step: int, phases: Sequence[tuple[int, float]]) -> float:
    return [share for first, share in phases if first <= step][-1]
