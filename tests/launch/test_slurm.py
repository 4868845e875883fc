"""The Slurm launcher: what it writes, and real jobs on a real Slurm."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.job import Job
from launch.slurm import Slurm
from tests.conftest import ROOT, Finished
from tests.held import HELD, STEP
from tests.launch.conftest import COMMON, same_as
from tests.test_survival import last_step
from trainer.errors import SetupError

ENDED = ("COMPLETED", "FAILED", "CANCELLED")


@pytest.fixture
def here(cluster, tmp_path, trainer_env, monkeypatch, capfd):
    """`here("launch.stop", "run=run")`: a command for the cluster in this process, which has paid for its imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launch"])
    for name in ("SLURM_CONF", "PYTHONPATH"):
        monkeypatch.setenv(name, {**trainer_env, "SLURM_CONF": cluster.env["SLURM_CONF"]}[name])

    def call(module: str, *words: str) -> Finished:
        code = importlib.import_module(module).main(words)
        return Finished(code, *capfd.readouterr(), tmp_path / "runs")

    return call


@pytest.fixture
def on_slurm(here):
    """Launch two ranks on the cluster; returns the number of the job."""

    def launch(*words: str) -> str:
        done = here("launch.__main__", "launcher=slurm", "launcher.ranks_per_node=2", *words).check()
        return re.search(r"job (\d+)", done.stdout)[1]

    return launch


def state(here) -> str:
    """How the run `run` stands, as launch.status tells."""
    return json.loads(here("launch.status", "run=run", "--json").check().stdout)[0]["state"]


def told(cluster, run: Path, job: str, *how: str) -> None:
    """Signal a job; scancel may have to be asked again, and may have done it though it says that it could not."""
    cluster.wait_for(
        lambda: cluster.signal(job, *how) or "Exited with exit code 75" in output(run), lambda: output(run)
    )


def output(run: Path) -> str:
    return "".join(path.read_text() for path in sorted((run / "launch").glob("*.out")))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_is_preempted_requeued_and_goes_on(cluster, on_slurm, whole, tmp_path):
    """Two ranks that srun starts; SIGUSR1 to every process and to the batch script: one save, requeue, resume."""
    run, job = tmp_path / "runs" / "run", on_slurm(*COMMON, *HELD, "name=run")
    cluster.wait_for(lambda: last_step(run) >= STEP, lambda: output(run))
    told(cluster, run, job, "--signal=USR1", "--full")
    cluster.wait_for(lambda: cluster.state(job) in ENDED, lambda: output(run))
    assert cluster.state(job) == "COMPLETED", output(run)
    assert "preempted at step" in output(run) and "resuming" in output(run)
    same_as(whole, run)


@pytest.fixture
def stand_in(tmp_path: Path) -> list[str]:
    """Words that put rank.py where the job looks for the trainer."""
    package = tmp_path / "stand_in" / "trainer"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("rank.py"), package / "__main__.py")
    variables = f"PYTHONPATH={package.parent} REAL_TRAINER={ROOT / 'trainer'}"
    return [f"launcher.setup=['export {variables}']", "experiment=digits_mlp", "name=run"]


def said(run: Path, rank: int) -> list[str]:
    path = run / f"said_{rank}"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.dist
@pytest.mark.parametrize(
    ("agent", "how"),
    [
        ("srun", ["--signal=USR1", "--batch"]),  # to the batch script alone, which passes it on
        ("srun", ["--signal=USR2", "--full"]),  # to all of the step, and to the batch script
        ("torchrun", ["--signal=USR2", "--full"]),  # to the agent too, which passes it on
    ],
)
def test_a_signal_told_by_several_is_one_request(cluster, on_slurm, stand_in, tmp_path, agent, how):
    run, job = tmp_path / "runs" / "run", on_slurm(*stand_in, f"launcher.agent={agent}")
    cluster.wait_for(lambda: all(said(run, rank) for rank in (0, 1)), lambda: output(run))
    told(cluster, run, job, *how)
    cluster.wait_for(lambda: cluster.state(job) in ENDED, lambda: output(run))
    assert cluster.state(job) == "COMPLETED", output(run)
    for rank in (0, 1):
        first, saves, saved, again, finishes = said(run, rank)
        assert first == again and first.startswith(f"starts 2 {rank} ")
        assert (saves.split()[0], saved, finishes) == ("saves", "saved", "finishes")


@pytest.mark.dist
def test_a_cancelled_job_saves_and_does_not_come_back(cluster, on_slurm, stand_in, here, tmp_path):
    """scancel: SIGTERM to the ranks and to the batch script. Nobody asks for a requeue."""
    run, job = tmp_path / "runs" / "run", on_slurm(*stand_in)
    cluster.wait_for(lambda: all(said(run, rank) for rank in (0, 1)), lambda: output(run))
    assert state(here) == "starting"  # it has not yet said that it runs
    told(cluster, run, job)
    cluster.wait_for(lambda: state(here) == "preempted", lambda: output(run))
    assert cluster.state(job) == "CANCELLED" and said(run, 1)[-1] == "saved"


@pytest.mark.dist
def test_a_second_signal_later_leaves_at_once(cluster, on_slurm, stand_in, tmp_path):
    slow = [stand_in[0].replace("export", "export SAVES_FOR=60"), *stand_in[1:]]
    run, job = tmp_path / "runs" / "run", on_slurm(*slow)
    cluster.wait_for(lambda: all(said(run, rank) for rank in (0, 1)), lambda: output(run))
    told(cluster, run, job, "--signal=USR1")

    def gone() -> bool:
        cluster.signal(job, "--signal=USR2")
        return cluster.state(job) in ENDED

    cluster.wait_for(gone, lambda: output(run))
    assert cluster.state(job) == "FAILED" and "exit code 140" in output(run)  # 128 + SIGUSR2
    assert said(run, 0)[-1] == "saves SIGUSR1"


@pytest.mark.dist
def test_stop_and_resume_through_slurm(cluster, on_slurm, stand_in, here, tmp_path):
    """launch.stop saves without a requeue; launch.resume submits the same again; a queued job is no free name."""
    run, job = tmp_path / "runs" / "run", on_slurm(*stand_in)
    refused = here("launch.__main__", "launcher=slurm", *stand_in)
    assert refused.returncode == 2 and f"job {job}" in refused.stderr and "has not ended" in refused.stderr
    cluster.wait_for(lambda: all(said(run, rank) for rank in (0, 1)), lambda: output(run))
    assert "will not be requeued" in here("launch.stop", "run=run").check().stdout
    cluster.wait_for(lambda: state(here) == "preempted", lambda: output(run))
    assert cluster.state(job) == "FAILED"  # exit code 75
    again = here("launch.resume", "run=run").check()
    other = re.search(r"job (\d+)", again.stdout)[1]
    cluster.wait_for(lambda: cluster.state(other) in ENDED, lambda: output(run))
    assert cluster.state(other) == "COMPLETED" and said(run, 0)[-1] == "finishes"
    assert state(here) == "finished"


@pytest.mark.dist
def test_within_an_allocation_srun_is_waited_for(cluster, stand_in, launching, here, tmp_path):
    launching.env["SLURM_CONF"], launching.prefix = cluster.env["SLURM_CONF"], ["salloc", "--quiet", "--ntasks=2"]
    run = tmp_path / "runs" / "run"
    words = ("launcher=slurm", "launcher.ranks_per_node=2", *stand_in)
    with launching.begun(*words, until=lambda: all(said(run, rank) for rank in (0, 1))) as process:
        assert "sent SIGTERM" in here("launch.stop", "run=run").check().stdout
        assert process.wait(60) == 75, (tmp_path / "launch.log").read_text()
    assert [said(run, rank)[-1] for rank in (0, 1)] == ["saved", "saved"]


@pytest.mark.dist
def test_failures_are_counted_and_an_array_ends_with_its_run(cluster, on_slurm, stand_in, tmp_path):
    failing = [stand_in[0].replace("export", "export FAILS=1"), *stand_in[1:]]
    run, job = tmp_path / "runs" / "run", on_slurm(*failing, "launcher.max_restarts=1")
    cluster.wait_for(lambda: cluster.state(job) == "FAILED", lambda: output(run))
    assert said(run, 0) == ["fails", "fails"]
    shutil.rmtree(run)
    job = on_slurm(*stand_in, "launcher.array=5")
    cluster.wait_for(lambda: all(said(run, rank) for rank in (0, 1)), lambda: output(run))
    told(cluster, run, f"{job}_1", "--signal=USR1")
    cluster.wait_for(lambda: not cluster.call("squeue", "--noheader"), lambda: output(run))
    assert [line.split()[0] for line in said(run, 1)] == ["starts", "saves", "saved", "starts", "finishes"]
    assert len(list((run / "launch").glob("*.out"))) == 2


def test_containers_see_the_folders_that_a_run_needs(tmp_path: Path) -> None:
    job = Job("run", tmp_path / "runs" / "run", (), None, tmp_path)
    options = {"container": "image.sqsh", "mounts": ["/data:/data"], "gpus_per_node": 8, "nodes": 2}
    script = Slurm(**options).render(job)["job.sh"]
    folders = [f"{path}:{path}" for path in (tmp_path, tmp_path / "runs")] + ["/data:/data"]
    assert f"--container-image=image.sqsh --container-mounts={','.join(folders)}" in script
    assert f"python -m trainer --config-path={job.folder}" in script and sys.executable not in script
    script = Slurm(**options, container_runtime="apptainer", python="/opt/python").render(job)["job.sh"]
    binds = " ".join(f"--bind {folder}" for folder in folders)
    assert f"apptainer exec --nv {binds} --pwd {tmp_path} image.sqsh /opt/python -m trainer" in script


def test_every_script_is_bash_and_asks_for_what_was_said(tmp_path: Path) -> None:
    job = Job("a/b", tmp_path / "50% of it" / "a" / "b", (), None, tmp_path)
    more = {"minutes": 90, "partition": "gpu", "sbatch": ["--constraint=a100"], "setup": ["module load cuda"]}
    for options in ({}, {"array": 3}, {"agent": "torchrun", "cpus_per_rank": 4}, {"requeue": False}):
        script = Slurm(nodes=2, ranks_per_node=4, **options, **more).render(job)["job.sh"]
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        asked = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
        assert {"--job-name=a.b", "--nodes=2", "--time=90", "--partition=gpu", "--constraint=a100"} <= set(asked)
        assert any(option.startswith("--output=") and "50%% of it" in option for option in asked)
        assert ("--requeue" in asked) == (options in ({}, {"agent": "torchrun", "cpus_per_rank": 4}))
        assert ("--array=1-3%1" in asked) == ("array" in options)
        if "agent" in options:  # one task a node, with the cores of its four ranks
            assert {"--ntasks-per-node=1", "--cpus-per-task=16"} <= set(asked) and "--nproc-per-node=4" in script
        else:
            assert "--ntasks-per-node=4" in asked and "torch.distributed.run" not in script


def test_no_sbatch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(SetupError, match="no sbatch on PATH"):
        Slurm().require()
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    with pytest.raises(SetupError, match="no srun on PATH"):
        Slurm().require()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nodes": 0}, "nodes=0"),
        ({"minutes": 2, "signal_seconds": 120}, "signal_seconds=120 is no less than minutes=2"),
        ({"mounts": ["/data"]}, "'/data' is not HOST:CONTAINER"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Slurm(**options)
