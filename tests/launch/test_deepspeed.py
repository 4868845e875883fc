"""The deepspeed launcher: its hostfile, what it writes, and real hosts."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.deepspeed import DeepSpeed
from launch.hostfile import choose, read_hostfile
from tests.held import HELD, STEP
from tests.launch.conftest import COMMON, same_as
from tests.test_survival import last_step
from trainer.errors import ConfigError, SetupError


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_a_hostfile_is_read_in_its_order(tmp_path: Path) -> None:
    assert read_hostfile(hostfile(tmp_path, "# a\n\nb slots=2\na  slots = 1 # old\n")) == {"b": 2, "a": 1}


def test_every_wrong_line_of_a_hostfile_is_named(tmp_path: Path) -> None:
    path = hostfile(tmp_path, "a slots=2\nb slot=3\na slots=1\nc slots=x\nd slots=0\n")
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == [f"{path}:{n}" for n in (2, 3, 4, 5)]
    for text, words in (("# none\n", "names no host"), (None, "cannot be read")):
        path = tmp_path / "nowhere" if text is None else hostfile(tmp_path, text)
        with pytest.raises(ConfigError, match=words):
            read_hostfile(path)


def test_hosts_and_slots_are_included_and_excluded() -> None:
    slots = {"a": 4, "b": 2}
    assert choose(slots, None, None) == {"a": [0, 1, 2, 3], "b": [0, 1]}
    assert choose(slots, "b@a:2,0", None) == {"a": [0, 2], "b": [0, 1]}
    assert choose(slots, None, "b@a:0") == {"a": [1, 2, 3]}


@pytest.mark.parametrize(
    ("include", "exclude", "words"),
    [
        ("b:2", None, "b has the slots 0 to 1, not 2"),
        ("worker-1", None, "no 'worker-1'; did you mean worker-01"),
        (None, "b@worker-01", "leaves no slot"),
        ("b", "b", "exclude each other"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(include: str | None, exclude: str | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose({"b": 2, "worker-01": 1}, include, exclude)


def test_secrets_are_not_taken_along() -> None:
    with pytest.raises(ValueError, match="WANDB_API_KEY looks like a secret"):
        DeepSpeed(variables=["WANDB_API_KEY"])


def test_hosts_that_ssh_does_not_reach_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("ssh", "#!/bin/sh\necho no route >&2; exit 255\n"), ("pdsh", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    launcher = DeepSpeed(hostfile=str(hostfile(tmp_path, "far slots=1\n")))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(SetupError, match="far: no route"):
        launcher.require()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SetupError, match="no pdsh and no ssh on PATH"):
        launcher.require()
    DeepSpeed(hostfile=str(hostfile(tmp_path, "localhost slots=1\n"))).require()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hosts_over_ssh_are_stopped_and_their_run_goes_on_elsewhere(ssh_hosts, launching, whole, tmp_path):
    """`deepspeed` over pdsh and ssh, a rank on each of two hosts; launch.stop, exit code 75; then one rank here."""
    hostfile(tmp_path, "".join(f"{address} slots=1\n" for address in ssh_hosts.addresses))
    place = ("launcher=deepspeed", "launcher.hostfile=hosts", "launcher.ssh_port=2222")
    run = tmp_path / "runs" / "moved"
    words = (*place, "launcher.variables=[GLOO_SOCKET_IFNAME]", *COMMON, *HELD, "name=moved")
    with launching.begun(*words, until=lambda: last_step(run) >= STEP) as process:
        assert "SIGUSR1 to rank 0" in launching("run=moved", module="launch.stop").check().stdout
        assert process.wait(120) == 75, (tmp_path / "launch.log").read_text()
    assert launching.state("moved")["state"] == "preempted"
    assert "2 x cpu" in (tmp_path / "launch.log").read_text()
    launching.prefix = []  # outside of the two hosts
    launching("launcher=local", *COMMON, "name=moved").check()
    same_as(whole, run)
