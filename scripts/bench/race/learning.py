"""The race in learning: two entrants train the same model at the same time, each bound to a core of its own, with
several seeds, the cores exchanged from seed to seed. What counts is how soon the validation loss is reached, and how
well the models translate."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from race.figures import OURS, spread
from race.running import Runner, make_spec

CORES = (0, 1)


class Course:
    """How a run went: `steps`, and at each of them the seconds of training since the first step (validation left out)
    and the target tokens so far; `losses`: (seconds, loss) of each validation; `saved`: (step, checkpoint)."""

    def __init__(self, ranks: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        tokens: dict[int, int] = defaultdict(int)
        for event in (event for events in ranks for event in events if event["event"] == "step"):
            tokens[event["step"]] += event["target_tokens"]
        self.steps: list[int] = []
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.losses: list[tuple[float, float]] = []
        self.saved: list[tuple[int, str]] = []
        begun, elsewhere, before = 0.0, 0.0, 0.0
        for event in sorted(ranks[0], key=lambda event: event["time"]):
            if event["event"] == "step":
                self.steps.append(event["step"])
                begun = begun or event["time"]
                self.seconds.append(event["time"] - begun - elsewhere)
                self.tokens.append(tokens[event["step"]] + (self.tokens[-1] if self.tokens else 0))
            elif event["event"] == "validated" and self.seconds:
                elsewhere += event["time"] - before
                self.losses.append((self.seconds[-1], event["loss"]))
            elif event["event"] == "saved":
                self.saved.append((event["step"], event["path"]))
            if event["event"] in ("step", "validating"):
                before = event["time"]
        self.saved = [(step, path) for step, path in self.saved if step in self.steps]

    def at(self, step: int) -> tuple[float, int]:
        """Seconds and tokens after `step`."""
        place = self.steps.index(step)
        return self.seconds[place], self.tokens[place]

    def last_saved(self, seconds: float = float("inf"), tokens: float = float("inf")) -> tuple[int, str]:
        """The last checkpoint within so many seconds and tokens; else the first."""
        within = [one for one in self.saved if self.at(one[0])[0] <= seconds and self.at(one[0])[1] <= tokens]
        return within[-1] if within else self.saved[0]

    def seconds_to(self, loss: float) -> float | None:
        """When the validation loss first fell to `loss`, on the straight line between two validations; None: never."""
        if self.losses and self.losses[0][1] <= loss:
            return self.losses[0][0]
        for (early, high), (late, low) in zip(self.losses, self.losses[1:], strict=False):
            if low <= loss:
                return early + (high - loss) / (high - low) * (late - early)
        return None


def learn(lap: dict[str, Any], rival: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What came of each seed."""
    return [_one_seed(lap, rival, seed, options) for seed in range(options.seeds)]


def _one_seed(lap: dict[str, Any], rival: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    runners = {}
    for place, name in enumerate((OURS, rival)):
        out = options.work / "runs" / "learn" / f"{name}_{seed}"
        shutil.rmtree(out, ignore_errors=True)
        every = {"save_every": options.learn_steps, "validate_every": options.learn_steps}
        spec = make_spec(lap, name, out, seed=seed, **every)
        runners[name] = Runner(spec, options.python.get(name, sys.executable), [CORES[(place + seed) % 2]])
    _run(list(runners.values()), 60 * options.minutes)
    courses = {name: Course(runner.everything()) for name, runner in runners.items()}
    mark = courses[rival].saved[-1]
    seconds, tokens = courses[rival].at(mark[0])
    chosen = {
        "rival": (rival, mark),
        "same_seconds": (OURS, courses[OURS].last_saved(seconds=seconds)),
        "same_tokens": (OURS, courses[OURS].last_saved(tokens=tokens)),
    }
    bleu = _translate(runners, chosen, Path(lap["data"]["test"]), options)
    loss = max(course.losses[-1][1] for course in courses.values())
    result = {
        "seed": seed,
        "seconds": seconds,
        "tokens": {name: course.at(course.last_saved(seconds=seconds)[0])[1] for name, course in courses.items()},
        "bleu": bleu,
        "loss": loss,
        "seconds_to_loss": {name: course.seconds_to(loss) for name, course in courses.items()},
        "curves": {name: course.losses for name, course in courses.items()},
    }
    for runner in runners.values():
        shutil.rmtree(runner.out)
    return result


def _run(runners: Sequence[Runner], seconds: float) -> None:
    """Let each train for so long after its first step."""
    try:
        for runner in runners:
            runner.start()
        for runner in runners:
            runner.until(1)
        going = list(runners)
        while going:
            time.sleep(0.2)
            for runner in list(going):
                runner.poll()
                if time.time() - runner.steps()[0]["time"] > seconds:
                    runner.end()
                    going.remove(runner)
    finally:
        for runner in runners:
            runner.end()


def _translate(
    runners: Mapping[str, Runner], chosen: Mapping[str, tuple[str, tuple[int, str]]], test: Path, options: Any
) -> dict[str, float]:
    """BLEU of each chosen checkpoint on sentences at equal distances of the test split."""
    from sacrebleu.metrics.bleu import BLEU

    rows = [json.loads(line) for line in test.read_text(encoding="utf-8").splitlines()]
    rows = rows[:: max(len(rows) // options.test_samples, 1)][: options.test_samples]
    scores = {}
    for key, (name, (_, checkpoint)) in chosen.items():
        runner = runners[name]
        texts, output = runner.out / "input.txt", runner.out / f"{key}.txt"
        texts.write_text("".join(" ".join(row["source"].split()) + "\n" for row in rows), encoding="utf-8")
        runner.translate(checkpoint, texts, output, options.beams)
        hypotheses = output.read_text(encoding="utf-8").split("\n")[: len(rows)]
        scores[key] = BLEU().corpus_score(hypotheses, [[row["target"] for row in rows]]).score
    return scores


def report(results: Sequence[Mapping[str, Any]], rival: str) -> str:
    """Markdown: a line a seed, then medians of ratios."""
    heads = ["seed", f"BLEU {rival}", "ours, same seconds", "ours, same tokens", "seconds", f"tokens ours / {rival}"]
    heads += ["loss", f"seconds to it, ours / {rival}"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for one in results:
        bleu, tokens, to = one["bleu"], one["tokens"], one["seconds_to_loss"]
        cells = [one["seed"], *(f"{bleu[key]:.2f}" for key in ("rival", "same_seconds", "same_tokens"))]
        cells += [f"{one['seconds']:.0f}", f"{tokens[OURS]:,} / {tokens[rival]:,}", f"{one['loss']:.3f}"]
        cells.append(" / ".join("never" if to[name] is None else f"{to[name]:.0f}" for name in (OURS, rival)))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    reached = [one["seconds_to_loss"] for one in results if None not in one["seconds_to_loss"].values()]
    if reached:
        lines += ["", f"Seconds to the loss, {rival} / ours: {spread([to[rival] / to[OURS] for to in reached])}"]
    gains = {
        key: [one["bleu"][key] - one["bleu"]["rival"] for one in results] for key in ("same_seconds", "same_tokens")
    }
    lines.append(f"BLEU above {rival}'s: after the same seconds {spread(gains['same_seconds'])},")
    lines.append(f"after the same tokens {spread(gains['same_tokens'])}; median of seeds and range.")
    mean = statistics.mean(one["bleu"]["rival"] for one in results)
    return "\n".join([*lines, f"Mean BLEU of {rival}: {mean:.2f}.", ""])


def draw(results: Sequence[Mapping[str, Any]], rival: str, path: Path) -> None:
    """Validation loss over seconds of training, a line a seed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for one in results:
        for name, colour in ((OURS, "#c2410c"), (rival, "#64748b")):
            seconds, losses = zip(*one["curves"][name], strict=True)
            label = name if one is results[0] else None
            axis.plot(seconds, losses, color=colour, linewidth=1.2, label=label)
    axis.set_xlabel("seconds of training on one core")
    axis.set_ylabel("validation loss, nats per token")
    axis.legend()
    figure.savefig(path, dpi=120)
