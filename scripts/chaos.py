"""Proof by chaos: a tiny run is killed, stopped, starved and garbled at random, and must end as if nothing had been.

    python scripts/chaos.py --rounds 100 --seed 0 [--out DIR] [--kinds kill_rank,fill_disk]

A round lets the run train for some steps, or begin to, and then does it one harm (`chaos_faults.py`). A campaign is
the rounds of one run, from its first step to its last, on the same engine and ranks or on others at every start; it
is compared with a run that nobody harmed: samples, curve, files, processes (`chaos_checks.py`). Campaign number i has
the seed `--seed` + i, so `--seed` of a failure begins with it; moments are not of the seed, so it may take several.
DIR/chaos.json has the result, DIR the failed runs. Exit code 1 after any failure. Filling the disk needs permission
to mount one; without, that is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from chaos_checks import check_run
from chaos_faults import AT_ANY_MOMENT, FAULTS, Target, breaking_server, expected_step
from chaos_job import Failure, Job, Shape, small_disk, write_data

from tests.data.servers import FaultyServer, serving

DISK_BYTES = 64 << 20
ENGINES = ("plain", "zero1", "zero2", "zero3")
NEEDS_DISK = ("fill_disk", "start_on_full_disk")
AT_THE_START = "break_wandb"
"""The kind that a job must be started with."""

EARLY_SECONDS = 8.0
"""A harm before the first step comes within so much time."""


@dataclass
class Tally:
    """What a whole session did. failures: campaign's seed, its rounds until then, and what was broken."""

    seed: int
    campaigns: int = 0
    rounds: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FAULTS, 0))
    early: int = 0
    failures: list[dict[str, object]] = field(default_factory=list)
    seconds: float = 0.0
    remark: str = ""

    def total(self) -> int:
        """Rounds of all kinds."""
        return sum(self.rounds.values())

    def save(self, folder: Path) -> None:
        """Write `chaos.json`."""
        (folder / "chaos.json").write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        width = max(map(len, FAULTS))
        lines = [f"{kind:<{width}}  {self.rounds[kind]:>5}" for kind in FAULTS]
        total = f"{self.total()} rounds ({self.early} before the first step), {self.campaigns} campaigns"
        lines += [f"{total}, {len(self.failures)} failures, {self.seconds:.0f} s"]
        lines += [f"--seed {one['seed']}: {' > '.join(one['rounds'])}: {one['what']}" for one in self.failures]
        return "\n".join([*lines, self.remark] if self.remark else lines)


class Range:
    """Where the shooting takes place: the data and their server, the references, and the folder for it all."""

    def __init__(self, folder: Path, server: FaultyServer, breaking_url: str, kinds: Sequence[str]) -> None:
        self.folder, self.server, self.kinds = folder, server, kinds
        self._wandb = {"WANDB_BASE_URL": breaking_url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}

    def start(self, run: Path, shape: Shape, dropout: float, number: int, kind: str = "") -> Job:
        """Begin a job of a run; `number`: of the start, for its log."""
        words = [f"data.path={self.server.url}/", f"model.dropout={dropout}"]
        breaks = kind == AT_THE_START
        sinks = "console,wandb" if breaks else "console"
        words += [f"logging=[{sinks}]", *(["logging.wandb.start_seconds=3"] if breaks else [])]
        log = self.folder / "logs" / run.parent.name / f"start_{number:03d}.log"
        return Job(run, log, shape, words, self._wandb if breaks else {}).start()

    def reference(self, shape: Shape, dropout: float) -> Path:
        """The run that nobody harms; made when first wanted."""
        run = self.folder / "references" / f"{shape.engine}_{shape.ranks}_{dropout}"
        if not (run / "status.json").exists():
            job = self.start(run, Shape(shape.engine, shape.ranks), dropout, len(list(run.parent.glob("*"))))
            job.wait_for_end()
            if not job.finished:
                raise Failure(f"the reference {run.name} did not come to its end:\n{job.told[-3000:]}")
        return run


class Campaign:
    """One run from its first step to its last. `rounds`: the kinds of harm it has come through."""

    def __init__(self, place: Range, seed: int, most_rounds: int, tally: Tally) -> None:
        self.place, self.seed, self.tally, self.most_rounds = place, seed, tally, most_rounds
        self.rng = random.Random(seed)
        self.moves = self.rng.random() < 0.4
        self.fixed = Shape(self.rng.choice(ENGINES), self.rng.choice([2, 2, 2, 2, 3, 4]))
        self.dropout = 0.0 if self.moves else 0.1  # dropout is drawn by rank
        self.rounds: list[str] = []
        self.deck: list[str] = []
        self.starts = 0

    def shape(self) -> Shape:
        """Of the next start."""
        engine, ranks = self.fixed.engine, self.fixed.ranks
        if self.moves:
            engine, ranks = self.rng.choice(ENGINES), self.rng.choice([1, 2, 2, 3, 4])
        return Shape(engine, ranks, self.rng.choice([0, 0, 1]), self.rng.choice([0, 0, 2]))

    def run(self) -> None:
        """Shoot until it ends or the rounds are used up, let it end, and compare. Raises Failure."""
        reference = self.place.reference(Shape("plain", 1) if self.moves else self.fixed, self.dropout)
        disk = self.place.folder / f"seed_{self.seed}"
        with small_disk(disk, DISK_BYTES) as mounted:
            if not mounted:
                self.tally.remark = "not permitted to mount a small disk: no disk was filled"
            kinds = [kind for kind in self.place.kinds if mounted or kind not in NEEDS_DISK]
            try:
                self._shoot(disk / "run", kinds, disk if mounted else None)
                check_run(disk / "run", reference, exact=not self.moves)
            except Failure:
                shutil.copytree(disk / "run", self.place.folder / "failed" / disk.name, dirs_exist_ok=True)
                raise
            finally:
                self.place.server.always, self.place.server.faults = None, []

    def _shoot(self, run: Path, kinds: Sequence[str], disk: Path | None) -> None:
        job: Job | None = None
        damaged: str | None = None
        try:
            while job is None or not job.finished:
                fresh = job is None or not job.alive
                kind = self._draw(kinds, fresh) if len(self.rounds) < self.most_rounds else ""
                if fresh:
                    wanted = expected_step(run, damaged)
                    job = self._start(run, kind)
                early = fresh and kind in AT_ANY_MOMENT and self.rng.random() < 0.2
                if early:
                    time.sleep(self.rng.uniform(0.2, EARLY_SECONDS))
                elif not kind or not job.wait_for_step(job.step + self.rng.randint(1, 7)):
                    self._let_end(job)
                    continue
                if fresh and job.first_step not in (None, wanted):
                    raise Failure(f"it went on from step {job.first_step}, not {wanted}:\n{job.told[:3000]}")
                self.tally.early += early
                self.tally.rounds[kind] += 1
                self.rounds.append(f"{kind}@{job.step}")
                time.sleep(self.rng.uniform(0.0, 0.1))  # any moment of a step
                target = Target(job, self.rng, self.place.server, disk, partial(self._start, run, ""))
                FAULTS[kind](target)
                if target.damaged is not None or job.first_step is not None:  # else it may not have been set aside yet
                    damaged = target.damaged
                self.tally.save(self.place.folder)
        finally:
            if job is not None:
                job.kill()

    def _draw(self, kinds: Sequence[str], fresh: bool) -> str:
        """The next kind of harm: each once, in any order, then all again."""
        for deck in (self.deck, self.rng.sample(list(kinds), len(kinds))):
            for kind in deck:
                if fresh or kind != AT_THE_START:
                    self.deck = [other for other in deck if other != kind]
                    return kind
        return "kill_all"  # so that the next start is a fresh one

    def _start(self, run: Path, kind: str) -> Job:
        self.starts += 1
        return self.place.start(run, self.shape(), self.dropout, self.starts, kind)

    def _let_end(self, job: Job) -> None:
        job.wait_for_end()
        if not job.finished:
            raise Failure(f"it ended by itself at step {job.step}, {job.status()}:\n{job.told[-3000:]}")


def shoot(rounds: int, seed: int, folder: Path, kinds: Sequence[str]) -> Tally:
    """Campaigns until so many rounds are done."""
    started, tally = time.monotonic(), Tally(seed)
    write_data(folder / "data")
    with serving(FaultyServer(folder / "data")) as server, breaking_server() as breaking_url:
        place = Range(folder, server, breaking_url, kinds)
        while tally.total() < rounds:
            campaign = Campaign(place, seed + tally.campaigns, rounds - tally.total(), tally)
            print(f"seed {campaign.seed}: {'moving' if campaign.moves else campaign.fixed}", flush=True)
            tally.campaigns += 1
            try:
                campaign.run()
            except Failure as failure:
                tally.failures.append({"seed": campaign.seed, "rounds": campaign.rounds, "what": str(failure)})
            tally.seconds = time.monotonic() - started
            told = "FAILED" if tally.failures and tally.failures[-1]["seed"] == campaign.seed else "held"
            print(f"seed {campaign.seed}: {told}: {' > '.join(campaign.rounds)}", flush=True)
            tally.save(folder)
    return tally


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="must not exist; default: a temporary folder, kept after a failure")
    parser.add_argument("--kinds", default=",".join(FAULTS), help="of harm, by comma; default: all")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if unknown := set(kinds) - set(FAULTS):
        parser.error(f"--kinds: {', '.join(sorted(unknown))} is none of {', '.join(FAULTS)}")
    folder = (options.out or Path(tempfile.mkdtemp(prefix="chaos_"))).absolute()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # no job and no disk is left behind
    os.environ["NETRC"] = str(folder / "netrc")  # no key of the user's
    tally = shoot(options.rounds, options.seed, folder, kinds)
    print(tally)
    print(json.dumps(asdict(tally)))
    if options.out is None and not tally.failures:
        shutil.rmtree(folder)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
