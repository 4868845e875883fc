"""scripts/setup.sh on machines that lack things: a PATH of our own, and an interpreter that plays any part."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = (
    *("bash", "sh", "awk", "cat", "chmod", "cksum", "cp", "df", "dirname"),
    *("find", "grep", "id", "mkdir", "rm", "sed", "tail"),
)
STUB = r"""#!/bin/sh
echo "$*" >>"$STUB_LOG"
case "$*" in
*'version_info[:2]'*) echo "$STUB_VERSION" ;;
*'version_info <'*) [ "$STUB_VERSION" = 3.12 ] ;;
*ensurepip*) [ -z "$STUB_NO_VENV" ] ;;
*Python.h*) echo "${STUB_HEADER:-$0}" ;;
*' install '*) [ -z "$STUB_PIP_SAYS" ] || { echo "$STUB_PIP_SAYS"; exit 1; } ;;
'-m venv '*)
    for folder; do :; done
    rm -rf "$folder"  # --clear
    mkdir -p "$folder/bin"
    cp "$0" "$folder/bin/python"
    echo "$folder" >"$folder/bin/activate"
    ;;
esac
"""


class Machine:
    """A clone in `clone`, tools in `tools`, and what the stub interpreter was asked in `calls`."""

    def __init__(self, folder: Path) -> None:
        self.clone, self.tools, self.log = folder / "clone", folder / "tools", folder / "calls"
        (self.clone / "scripts").mkdir(parents=True)
        self.tools.mkdir()
        for name in ("requirements.lock", "pyproject.toml", "scripts/setup.sh"):
            shutil.copy(ROOT / name, self.clone / name)
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, tool
            (self.tools / tool).symlink_to(found)
        self.add("python3", STUB)
        self.add("c++", "#!/bin/sh\n")

    def add(self, name: str, script: str) -> None:
        """Put a script on the PATH."""
        path = self.tools / name
        path.unlink(missing_ok=True)
        path.write_text(script)
        path.chmod(0o755)

    def set_up(self, cwd: Path | None = None, user: int | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        """Run setup.sh with nothing in the environment but PATH, HOME and `env`."""
        self.log.write_text("")
        self.log.chmod(0o666)
        fixed = {"PATH": str(self.tools), "HOME": "/nonexistent", "STUB_LOG": str(self.log), "STUB_VERSION": "3.12"}
        return subprocess.run(
            ["bash", str(self.clone / "scripts" / "setup.sh")],
            cwd=cwd or self.clone,
            env={**fixed, **env},
            user=user,
            text=True,
            capture_output=True,
            timeout=60,
        )

    @property
    def installs(self) -> list[str]:
        """The pip installations that were asked for."""
        return [line for line in self.log.read_text().splitlines() if " install " in line]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """It failed, saying all of `words`."""
    assert done.returncode == 1, done.stdout + done.stderr
    for word in words:
        assert word in done.stderr


def test_it_installs_the_lock_and_the_project_and_then_rests(machine: Machine, tmp_path: Path) -> None:
    first = machine.set_up(cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    lock, project = machine.installs
    assert lock.endswith("-r requirements.lock")
    assert "--no-deps" in project and project.endswith("--editable .")
    second = machine.set_up(cwd=tmp_path)
    assert "up to date" in second.stdout and machine.installs == []


def test_a_new_lock_is_installed(machine: Machine) -> None:
    machine.set_up()
    with (machine.clone / "requirements.lock").open("a") as lock:
        lock.write("another==1.0\n")
    assert "up to date" not in machine.set_up().stdout and len(machine.installs) == 2


def test_an_interrupted_one_is_finished_in_place(machine: Machine) -> None:
    assert machine.set_up(STUB_PIP_SAYS="killed").returncode == 1
    again = machine.set_up()
    assert again.returncode == 0 and "making .venv" not in again.stdout and len(machine.installs) == 2


def test_a_broken_one_is_made_anew(machine: Machine) -> None:
    (machine.clone / ".venv" / "bin").mkdir(parents=True)
    (machine.clone / ".venv" / "bin" / "python").symlink_to("/nonexistent/python")
    done = machine.set_up()
    assert done.returncode == 0 and "making .venv" in done.stdout


def test_a_moved_clone_is_made_anew(machine: Machine) -> None:
    machine.set_up()
    machine.clone = machine.clone.rename(machine.clone.with_name("moved clone"))
    done = machine.set_up()
    assert done.returncode == 0 and "making .venv" in done.stdout


def test_no_python(machine: Machine) -> None:
    (machine.tools / "python3").unlink()
    refused(machine.set_up(), "Python 3.11 or newer is missing (found: none)", "PYTHON=")


def test_an_old_python_is_named(machine: Machine) -> None:
    refused(machine.set_up(STUB_VERSION="3.9"), "Python 3.11 or newer is missing (found: python3=3.9)")


def test_a_newer_python_beside_an_old_one_is_found(machine: Machine) -> None:
    machine.add("python3", STUB.replace('"$STUB_VERSION"', "3.9"))
    machine.add("python3.13", STUB)
    done = machine.set_up()
    assert done.returncode == 0 and "making .venv with python3.13" in done.stdout


def test_python_can_be_named(machine: Machine, tmp_path: Path) -> None:
    (machine.tools / "python3").rename(tmp_path / "my python")
    assert machine.set_up(PYTHON=str(tmp_path / "my python")).returncode == 0


def test_no_venv_module(machine: Machine) -> None:
    refused(machine.set_up(STUB_NO_VENV="1"), "venv module of python3 is missing", "python3-venv")


def test_no_headers(machine: Machine) -> None:
    done = machine.set_up(STUB_HEADER="/nonexistent/Python.h")
    refused(done, "header files of python3 are missing (/nonexistent/Python.h)", "python3-dev")


def test_no_compiler(machine: Machine) -> None:
    (machine.tools / "c++").unlink()
    refused(machine.set_up(), "C++ compiler is missing", "apt-get install g++")


def test_another_compiler_is_found(machine: Machine) -> None:
    (machine.tools / "c++").rename(machine.tools / "clang++")
    done = machine.set_up()
    assert done.returncode == 0 and "using clang++" in done.stdout


def test_disk_nearly_full(machine: Machine) -> None:
    machine.add("df", "#!/bin/sh\necho Filesystem\necho /dev/x 100 90 2097152 90% /\n")
    refused(machine.set_up(), "disk is nearly full: 2048 MB free", "Free at least 4 GB")


@pytest.mark.parametrize(
    ("pip_says", "words"),
    [
        ("OSError: [Errno 28] No space left on device", ("the disk is full", "Free space")),
        ("NewConnectionError: connection refused", ("cannot reach its package index", "network")),
        ("ERROR: No matching distribution found for torch", ("could not install", "No matching distribution")),
    ],
)
def test_pip_fails(machine: Machine, pip_says: str, words: tuple[str, ...]) -> None:
    refused(machine.set_up(STUB_PIP_SAYS=pip_says), *words)


def test_not_writable(machine: Machine) -> None:
    for folder in machine.clone.parents:
        if os.access(folder, os.W_OK) and folder.name.startswith(("pytest", "popen")):
            folder.chmod(0o755)
    machine.clone.parent.chmod(0o755)
    machine.clone.chmod(0o555)
    done = machine.set_up(user=65534 if os.geteuid() == 0 else None)
    machine.clone.chmod(0o755)
    refused(done, f"cannot write to {machine.clone}", "writable")
