"""The race: the trainer and others train the same model on the same data, in turns on the same machine.

    python scripts/bench/race.py [--laps pairs256,packed256] [--entrants shardwright,hf,hf_grouped] [--ranks 1,2]
        [--rounds 5] [--seconds 5] [--threads 1] [--python lightning=PATH ...] [--work runs/race]

Laps and their shapes: scripts/bench/race/laps.py. Writes figures.json, table.md and race.png into the work folder,
where the heats of several calls come together; the lap "peak" writes peak.md. docs/race.md tells the method and every
entrant's settings.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent / "race")]

from race import figures, learning  # noqa: E402
from race.laps import LAPS, prepare  # noqa: E402
from race.running import ENTRANTS, Failed, Runner, make_spec  # noqa: E402

WARM_UP, SAVE_AT, SAVED_BY = 6, 4, 20
"""Steps before the first turn; of the run that saves a checkpoint: the step it does so at, and its last."""


PEAK_LAPS = ("pairs512", "packed512", "packed1024")


def heat(lap: dict[str, Any], entrants: list[str], ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """Figures by entrant of one lap on so many ranks; an entrant that fails is left out, and told."""
    threads = options.threads if ranks == 1 else 1
    folder = options.work / "runs" / f"{lap['lap']}_{ranks}x{threads}"
    shutil.rmtree(folder, ignore_errors=True)
    told = {"ranks": ranks, "threads": threads, "engine": "zero2" if ranks > 1 else "plain"}

    def runner_of(name: str, purpose: str, save_at: int | None = None) -> Runner:
        spec = make_spec(lap, name, folder / f"{name}_{purpose}", **told, save_at=save_at)
        return Runner(spec, options.python.get(name, sys.executable), list(range(max(ranks, threads))))

    saving = (
        {}
        if options.rates_only or "matmul" in entrants
        else {name: runner_of(name, "saving", SAVE_AT) for name in entrants}
    )
    running = {name: runner_of(name, "running") for name in entrants}
    try:
        for name, one in list(saving.items()):  # which also fills the caches of those that have one
            if not attempt(saving, name, lambda one=one: (one.start(), one.until(SAVED_BY), one.end())):
                del running[name]
        for name, one in list(running.items()):
            attempt(running, name, lambda one=one: (one.start(), one.until(WARM_UP), one.pause()))
        for round_ in range(options.rounds):
            for name in list(running) if round_ % 2 == 0 else list(reversed(running)):
                attempt(running, name, lambda name=name: running[name].turn(options.seconds, options.steps))
        memory = {name: runner.peak_memory() for name, runner in running.items()}
    finally:
        for runner in (*saving.values(), *running.values()):
            runner.end()
    return {
        name: figures.of_turns(runner, memory[name]) | (figures.of_saving(saving[name]) if name in saving else {})
        for name, runner in running.items()
    }


def attempt(runners: dict[str, Runner], name: str, action: Any) -> bool:
    """Do it; where it fails, tell and leave the entrant out."""
    try:
        action()
    except Failed as failure:
        print(f"left out: {failure}", file=sys.stderr, flush=True)
        runners.pop(name).end()
        return False
    return True


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    split = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--laps", type=split, default=["pairs256", "packed256"], help=f"of {', '.join(LAPS)}, peak")
    parser.add_argument("--entrants", type=split, default=["shardwright", "hf", "hf_grouped", "bare"])
    parser.add_argument("--ranks", type=split, default=["1", "2"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn, at least")
    parser.add_argument("--steps", type=int, default=4, help="of a turn, at least")
    parser.add_argument("--threads", type=int, default=1, help="of a single process; of two ranks, each has one")
    parser.add_argument("--python", action="append", default=[], metavar="ENTRANT=PATH")
    parser.add_argument("--rates-only", action="store_true", help="no run that saves a checkpoint")
    parser.add_argument("--learn", metavar="RIVAL", help="instead: train beside one other, and compare what was learnt")
    parser.add_argument("--minutes", type=float, default=3.0, help="of --learn: of training for each seed")
    parser.add_argument("--seeds", type=int, default=3, help="of --learn")
    parser.add_argument(
        "--learn-steps",
        type=int,
        default=37,
        help="of --learn: between two checkpoints and validations; not 50, after which transformers' groups of similar"
        " lengths begin anew: each checkpoint would come from the shortest texts",
    )
    parser.add_argument("--test-samples", type=int, default=400, help="of --learn: sentences to translate")
    parser.add_argument("--beams", type=int, default=4, help="of --learn")
    parser.add_argument("--work", type=Path, default=Path("runs/race"))
    options = parser.parse_args(words)
    for name in options.laps:
        if name not in (*LAPS, "peak"):
            parser.error(f"argument --laps: {name} is not known; choose from {', '.join(LAPS)}, peak")
    for option, names in (("entrants", options.entrants), ("learn", [options.learn] if options.learn else [])):
        for name in names:
            if name not in ENTRANTS:
                parser.error(f"argument --{option}: {name} is not known; choose from {', '.join(ENTRANTS)}")
    options.python = dict(pair.split("=", 1) for pair in options.python)
    options.work = options.work.resolve()
    return options


def main() -> None:
    """Run the heats and write what came of them."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and what was started is ended
    if options.learn is not None:
        learn(options)
    else:
        race(options)


def learn(options: argparse.Namespace) -> None:
    """Learning beside one rival: learning.json, learning.md, learning.png."""
    results = learning.learn(prepare("learn", options.work), options.learn, options)
    (options.work / "learning.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    report = learning.report(results, options.learn)
    (options.work / "learning.md").write_text(report, encoding="utf-8")
    learning.draw(results, options.learn, options.work / "learning.png")
    print(report)


def race(options: argparse.Namespace) -> None:
    """All heats; the files tell those of earlier calls too, but a heat that was run again only as it is now."""
    path = options.work / "figures.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in options.laps:
        if name == "peak":
            peak(options)
            continue
        lap = prepare(name, options.work)
        for ranks in map(int, options.ranks):
            entrants = [one for one in options.entrants if figures.takes_part(one, lap["kind"], ranks)]
            alone = f"1 process, {options.threads} thread{'s' * (options.threads > 1)}"
            title = f"{name}, {f'{ranks} ranks, ZeRO-2' if ranks > 1 else alone}"
            results[title] = heat(lap, entrants, ranks, options)
            print(figures.table({title: results[title]}), flush=True)
            path.write_text(json.dumps(results, indent=1), encoding="utf-8")
            (options.work / "table.md").write_text(figures.table(results), encoding="utf-8")
            figures.draw(results, options.work / "race.png")


def peak(options: argparse.Namespace) -> None:
    """A line for each shape of d >= 512: our share of what bf16 products reach in turns with us."""
    lines = []
    for name in PEAK_LAPS:
        lap = prepare(name, options.work)
        both = heat(lap, [figures.OURS, "matmul"], 1, options)
        shares, rate = figures.shares_of_peak(lap, both), both["matmul"]["tokens_per_second"]
        spread = figures.spread(shares)
        lines.append(f"{name}, {options.threads} threads: {spread} of the bf16 matrix peak, {rate / 1e9:.0f} GFLOP/s\n")
        print(lines[-1], end="", flush=True)
    (options.work / "peak.md").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
