"""What a run wrote of itself, read back for people: metrics.jsonl, status, configuration and its newest texts."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import CheckpointError
from trainer.run_directory import RunDirectory
from trainer.wording import flatten

Curve = tuple[list[int], list[float]]
"""Steps, and the value at each."""

_KEPT = 16_384
"""Points of a curve in memory, of a run of any length: several times what a screen shows."""


@dataclass(frozen=True)
class History:
    """One run. curves: by their names in metrics.jsonl, evaluations as `eval/...`, `thinned` where they are long;
    events: (step, message)."""

    name: str
    directory: Path
    status: Mapping[str, Any]
    settings: Mapping[str, Any]
    plan: Mapping[str, Any]
    curves: Mapping[str, Curve]
    events: Sequence[tuple[int, str]]
    final: Mapping[str, Any]

    def last(self, curve: str) -> float | None:
        """The newest value of a curve."""
        values = self.curves.get(curve, ([], []))[1]
        return values[-1] if values else None

    @property
    def last_step(self) -> int:
        """The newest logged step; 0 before the first."""
        return max((steps[-1] for steps, _ in self.curves.values()), default=0)

    def samples(self, most: int) -> list[dict[str, Any]]:
        """The first texts of the newest evaluation that wrote any."""
        files = sorted((self.directory / "generations").glob("step_*.jsonl"))
        return _first_lines(files[-1], most) if files else []

    def developing(self, texts: int, steps: int) -> list[tuple[dict[str, Any], list[tuple[int, str]]]]:
        """How the first `texts` of the validation split came out at most `steps` of its evaluations, evenly spaced: a
        text, and (step, hypothesis) of each; [] of fewer than two evaluations."""
        files = sorted(
            path for path in (self.directory / "generations").glob("step_*.jsonl") if path.name.count(".") == 1
        )
        chosen = [files[place * (len(files) - 1) // (steps - 1)] for place in range(steps)] if files else []
        by_step = {int(path.stem.removeprefix("step_")): _first_lines(path, texts) for path in dict.fromkeys(chosen)}
        if len(by_step) < 2:
            return []
        together = zip(*by_step.values(), strict=False)
        return [
            (rows[-1], [(step, row.get("hypothesis", "")) for step, row in zip(by_step, rows, strict=True)])
            for rows in together
        ]

    def quarantine(self, most: int) -> tuple[list[tuple[str, int]], list[dict[str, Any]]]:
        """Of the records that gave no sample: (stage, how many), and the first of them."""
        path = self.directory / "quarantine.jsonl"
        if not path.exists():
            return [], []
        with path.open(encoding="utf-8") as lines:
            counts = Counter(json.loads(line)["stage"] for line in lines if line.endswith("\n"))
        return counts.most_common(), _first_lines(path, most)


def _first_lines(path: Path, most: int) -> list[dict[str, Any]]:
    """Objects of the first whole lines of a file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, most) if line.endswith("\n")]


def read_history(directory: RunDirectory) -> History:
    """All of a run but its checkpoints. Raises CheckpointError, with file and line, where metrics.jsonl is damaged."""
    curves: defaultdict[str, _LongCurve] = defaultdict(_LongCurve)
    events: list[tuple[int, str]] = []
    for row in _rows(directory.metrics):
        step = int(row["step"])
        if "event" in row:
            events.append((step, str(row["event"])))
        elif row.get("split", "validation") == "validation":
            for name, value in flatten(row):
                if name != "step" and isinstance(value, int | float):
                    curves[name].add(step, float(value))
    final = json.loads(directory.evaluation.read_text(encoding="utf-8")) if directory.evaluation.exists() else {}
    plan = directory.path / "plan.json"
    return History(
        name=directory.path.name,
        directory=directory.path,
        status=directory.read_status(),
        settings=dict(flatten(yaml.safe_load(directory.config.read_text(encoding="utf-8")))),
        plan=json.loads(plan.read_text(encoding="utf-8")) if plan.exists() else {},
        curves={name: curve.points for name, curve in curves.items()},
        events=events,
        final=final,
    )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one that is still being written is left out."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                int(row["step"])
            except (ValueError, KeyError, TypeError) as error:
                if not line.endswith(b"\n"):
                    return
                raise CheckpointError(
                    f"{path}:{number} is no line of metrics ({error}); remove it, or restore the file."
                ) from error
            yield row


def differing_settings(histories: Sequence[History]) -> list[tuple[str, list[Any]]]:
    """(key, its value in each run) of every setting that is not the same in all; a run without the key has None."""
    keys = sorted({key for history in histories for key in history.settings if key != "name"})
    rows = [(key, [history.settings.get(key) for history in histories]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


class _LongCurve:
    """A curve that is thinned as it grows, everywhere alike, so that a run of any length takes the same memory."""

    def __init__(self) -> None:
        self.points: Curve = ([], [])
        self._kept = 0
        """Points that have been thinned; those after them are as they came."""
        self._share = 1
        """Of so many points one is kept."""

    def add(self, step: int, value: float) -> None:
        """The next point."""
        steps, values = self.points
        steps.append(step)
        values.append(value)
        if len(steps) - self._kept == _KEPT:
            self._thin()

    def _thin(self) -> None:
        """Bring what came since the last time to the density of what is kept; halve that of all where it is much."""
        (steps, values), kept = self.points, self._kept
        if self._share > 1:
            steps[kept:], values[kept:] = thinned((steps[kept:], values[kept:]), _KEPT // self._share)
        if len(steps) > _KEPT:
            steps[:], values[:] = thinned(self.points, len(steps) // 2)
            self._share *= 2
        self._kept = len(steps)


def thinned(curve: Curve, most: int) -> Curve:
    """At most about `most` points that show what the whole curve shows: of each stretch the lowest and the highest
    value, so that no spike is lost."""
    steps, values = curve
    if len(steps) <= most:
        return curve
    width = -(-2 * len(steps) // most)
    kept: list[int] = [0]
    for start in range(0, len(steps), width):
        stretch = range(start, min(start + width, len(steps)))
        kept += sorted({min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)})
    kept.append(len(steps) - 1)
    places = sorted(set(kept))
    return [steps[place] for place in places], [values[place] for place in places]
