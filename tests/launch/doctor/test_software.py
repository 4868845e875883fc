"""Packages and compilers that are missing or do not fit, made so by the paths of a process."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

from tests.launch.doctor.examine import examine, script


def package(folder, name, text, **files):
    (folder / name).mkdir(parents=True)
    for file, content in {"__init__": text, **files}.items():
        (folder / name / f"{file}.py").write_text(content)
    return str(folder)


def test_a_path_without_compilers(tmp_path):
    code, found = examine("compilers", env={"PATH": str(tmp_path), "CXX": None})
    assert code == 0, "training does without"
    assert found["compiler"]["state"] == found["ninja"]["state"] == "warning"
    assert "apt-get install g++" in found["compiler"]["cure"] and found["libaio"]["state"] == "skipped"


def test_a_compiler_that_does_not_compile(tmp_path):
    path = script(
        tmp_path, "c++", "echo 'try.cpp:2:10: fatal error: Python.h: No such file or directory' >&2", "exit 1"
    )
    _, found = examine("compilers", env={"PATH": path, "CXX": None})
    assert found["compiler"]["state"] == "warning" and "Python.h: No such file" in found["compiler"]["seen"]


NVCC = (
    "echo 'nvcc: NVIDIA (R) Cuda compiler driver'",
    "echo 'Cuda compilation tools, release {release}, V{release}.88'",
)


@pytest.mark.parametrize("release, state", [("12.4", "ok"), ("13.0", "warning"), (None, "warning")])
def test_the_cuda_toolkit_has_to_fit_torch(tmp_path, release, state):
    fake = package(tmp_path / "packages", "torch", "", version="cuda = '12.8'\nhip = None\n")
    home = tmp_path / "cuda"
    if release:
        script(home, "unused")
        script(home / "bin", "nvcc", *(line.format(release=release) for line in NVCC))
    env = {"PYTHONPATH": fake, "CUDA_HOME": str(home), "PATH": "/usr/bin:/bin"}
    _, found = examine("compilers", env=env)
    assert found["nvcc"]["state"] == state
    if release == "13.0":
        assert "is CUDA 13.0, torch is built for 12.8" in found["nvcc"]["seen"]


def test_a_torch_that_does_not_load(tmp_path):
    text = "raise ImportError('libcudart.so.12: cannot open shared object file')"
    code, found = examine("torch", env={"PYTHONPATH": package(tmp_path, "torch", text)})
    assert code == 1 and "libcudart.so.12" in found["torch"]["seen"] and found["torch"]["cure"]


def test_a_deepspeed_that_does_not_load(tmp_path):
    fake = package(tmp_path, "deepspeed", "raise RuntimeError('built for another torch')")
    code, found = examine("deepspeed", env={"PYTHONPATH": fake})
    assert code == 1 and "built for another torch" in found["deepspeed"]["seen"]
    assert "engine=plain" in found["deepspeed"]["cure"]


def test_a_package_of_a_version_that_is_not_supported(tmp_path):
    try:
        version("shardwright")
    except PackageNotFoundError:
        pytest.skip("needs this project installed (pip install -e .)")
    metadata = tmp_path / "deepspeed-0.9.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.9.0\n")
    code, found = examine("packages", env={"PYTHONPATH": str(tmp_path)})
    assert code == 1 and "deepspeed is 0.9.0, and" in found["packages"]["seen"]
    assert sys.executable in found["python"]["seen"]
