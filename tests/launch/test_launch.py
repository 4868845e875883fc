"""`python -m launch`: what is refused before anything is started, and what is written down."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launch import stop
from launch.__main__ import main
from launch.job import Job
from launch.local import Local
from launch.prepare import frozen_config
from trainer.__main__ import main as trainer_main

Launch = Callable[..., tuple[int, str, str]]
WORDS = ("experiment=digits_mlp", "name=run")


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Launch:
    """`launch(*words)` in this process and an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launch"])

    def call(*words: str) -> tuple[int, str, str]:
        code = main(words)
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that were submitted; none of them really is, and they count as running."""
    jobs: list[Job] = []

    def submit(self: Local, job: Job) -> int:
        jobs.append(job)
        job.remember({"pid": 1, "created": 0.0, "host": "here"})
        return 75

    monkeypatch.setattr(Local, "submit", submit)
    monkeypatch.setattr(Local, "alive", lambda self, handle: True)
    return jobs


@pytest.mark.parametrize("place", ["local", "slurm", "deepspeed"])
def test_a_dry_run_writes_what_would_be_done_and_starts_nothing(
    launch: Launch, tmp_path: Path, place: str, started: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "do-not-tell")
    code, out, _ = launch(f"launcher={place}", *WORDS, "optimizer.lr=0.5", "dry_run=true")
    folder = tmp_path / "runs" / "run" / "launch"
    script = folder / ("job.sh" if place == "slurm" else "run.sh")
    assert code == 0 and started == []
    assert f"-m trainer --config-path={folder}" in script.read_text().replace("--module trainer", "-m trainer")
    assert script.read_text() in out and script.stat().st_mode & 0o111
    assert frozen_config(folder).optimizer["lr"] == 0.5
    assert yaml.safe_load((folder / "overrides.yaml").read_text()) == [*WORDS, "optimizer.lr=0.5"]
    origin = json.loads((folder / "origin.json").read_text())
    assert origin["cwd"] == str(tmp_path) and {"version", "host", "launched"} <= set(origin)
    assert not any("do-not-tell" in path.read_text() for path in folder.iterdir())
    assert [path.name for path in (tmp_path / "runs" / "run").iterdir()] == ["launch"]


def test_the_trainer_takes_the_frozen_configuration_as_it_is(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    launch(*WORDS, "steps=17", "dry_run=true")
    folder = tmp_path / "runs" / "run" / "launch"
    monkeypatch.setattr(sys, "argv", ["trainer", f"--config-path={folder}", "dry_run=true"])
    assert trainer_main() == 0
    assert "17 steps" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["launcher=slrum"], ["launcher=slrum is no choice of the group launcher; did you mean slurm?", "local"]),
        (["lancher=slurm"], ["lancher is no key", "did you mean launcher?"]),
        (["launcher.rank=2"], ["launcher.rank is no key of the configuration; did you mean launcher.ranks?"]),
        (["launcher.ranks=two"], ["launcher.ranks='two' is not a whole number or null"]),
        (["launcher.ranks=0"], ["ranks=0 is below the least possible value, 1"]),
        (["launcher=deepspeed", "launcher.include=a"], ["include and exclude choose from a hostfile"]),
        (["launcher=deepspeed", "launcher.hostfile=none"], ["launcher.hostfile=none cannot be read"]),
        (["stepps=3", "seed=x"], ["stepps is no key", "seed='x' is not a whole number"]),
        (["launcher.ranks=3", "batch.global_size=64", "batch.micro_size=32"], ["does not divide over 3 ranks"]),
        (["optimizer.lrr=1"], ["optimizer.lrr is no"]),
        (["dry_run=perhaps"], ["dry_run=perhaps must be true or false"]),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    launch: Launch, tmp_path: Path, started: list[Job], words: list[str], told: list[str]
) -> None:
    code, _, err = launch(*WORDS, *words)
    assert code == 2 and err.startswith("error: ") and "Traceback" not in err
    for part in told:
        assert part in err
    assert started == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", [["--config-dir=site"], ["--config-dir", "site"]])
def test_a_site_has_launchers_of_its_own(launch: Launch, tmp_path: Path, flag: list[str]) -> None:
    (tmp_path / "site" / "launcher").mkdir(parents=True)
    (tmp_path / "site" / "launcher" / "ours.yaml").write_text("defaults: [slurm]\npartition: gpu\nranks_per_node: 8\n")
    code, out, _ = launch(*flag, "launcher=ours", "launcher.nodes=2", *WORDS, "dry_run=true")
    assert code == 0 and "#SBATCH --partition=gpu" in out and "--ntasks=16" in out
    code, _, err = launch(*flag, "launcher=our", *WORDS)
    assert code == 2 and "did you mean ours?" in err


def test_a_name_that_is_taken_is_refused(launch: Launch, started: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """While it runs; and, though it has not begun, with another configuration; what may differ may."""
    assert launch(*WORDS)[0] == 75 and len(started) == 1
    code, _, err = launch(*WORDS)
    assert code == 2 and "has not ended" in err and "python -m launch.stop run=run" in err
    monkeypatch.setattr(Local, "alive", lambda self, handle: False)
    code, _, err = launch(*WORDS, "seed=1")
    assert code == 2 and "seed: 0 -> 1" in err
    assert launch(*WORDS, "log.every=5")[0] == 75 and len(started) == 2


def test_a_run_of_another_configuration_is_refused_with_the_difference(
    launch: Launch, tmp_path: Path, started: list[Job]
) -> None:
    launch(*WORDS, "dry_run=true")
    run = tmp_path / "runs" / "run"
    frozen = (run / "launch" / "train.yaml").read_text()
    (run / "config.yaml").write_text(frozen[frozen.index("name: run") :])
    code, _, err = launch(*WORDS, "optimizer.lr=0.5")
    assert code == 2 and "optimizer.lr:" in err and "-> 0.5" in err and started == []
    code, _, err = launch(*WORDS, "resume=never")
    assert code == 2 and "resume=never" in err


def test_a_restart_of_a_new_run_may_go_on(launch: Launch, started: list[Job]) -> None:
    """resume=never is asked when it is launched; a requeue finds the run directory of its own."""
    launch(*WORDS, "resume=never")
    assert frozen_config(started[0].folder).resume == "auto"


def test_a_strangers_run_names_no_code_to_run(
    launch: Launch, started: list[Job], capfd: pytest.CaptureFixture[str]
) -> None:
    launch(*WORDS)
    (started[0].folder / "launcher.yaml").write_text("_target_: os.system\n")
    assert stop.main(["run=run"]) == 2
    assert "names code outside launch: os.system" in capfd.readouterr().err
