"""Python, packages, torch and its drivers, and the compilers for what is built at first use."""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from launch.doctor.findings import Finding, ok, problem, skipped, warning
from launch.doctor.gpus import nvidia_smi

if TYPE_CHECKING:
    from packaging.requirements import Requirement

LEAST_PYTHON = (3, 11)


def packages() -> list[Finding]:
    """Python, and whether every package that this project requires is installed in a version that it supports."""
    seen = f"Python {platform.python_version()} at {sys.executable}"
    least = ".".join(map(str, LEAST_PYTHON))
    python = (
        ok("python", seen)
        if sys.version_info >= LEAST_PYTHON
        else problem("python", f"{seen} is too old", f"install Python {least} or newer, then bash scripts/setup.sh")
    )
    from packaging.requirements import Requirement

    try:
        required = [Requirement(text) for text in requires("shardwright") or []]
    except PackageNotFoundError:
        reason = "shardwright is a folder on the path, not installed, so what it requires is not known"
        return [python, skipped("packages", reason, "pip install -e . in the clone")]
    needed = [entry for entry in required if entry.marker is None or entry.marker.evaluate({"extra": ""})]
    wrong = [text for entry in needed if (text := _misfit(entry))]
    if wrong:
        return [
            python,
            problem("packages", "; ".join(wrong), "pip install -r requirements.lock, or bash scripts/setup.sh"),
        ]
    return [python, ok("packages", f"all {len(needed)} required packages, in versions that are supported")]


def _misfit(required: Requirement) -> str:
    """What is wrong with the package that meets `required`; "" where it fits."""
    try:
        installed = version(required.name)
    except PackageNotFoundError:
        return f"{required.name} is missing"
    if required.specifier.contains(installed, prereleases=True):
        return ""
    return f"{required.name} is {installed}, and {required.specifier} is supported"


def torch_and_driver() -> list[Finding]:
    """Torch's build beside the driver, bf16, and the kernels of attention."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [problem("torch", f"cannot be imported: {error}", "bash scripts/setup.sh, or pip install torch")]
    on_gpu = torch.cuda.is_available()
    return [
        judge_build(torch.__version__, torch.version.cuda, torch.version.hip, on_gpu),
        _bf16(on_gpu),
        _attention(on_gpu),
    ]


def judge_build(torch_version: str, cuda: str | None, hip: str | None, on_gpu: bool) -> Finding:
    """A torch of this version, built for CUDA or ROCm or neither, beside the driver; `on_gpu`: it finds a GPU."""
    log = nvidia_smi()
    driver = None if log is None else (log.findtext("driver_version"), log.findtext("cuda_version"))
    built = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU"
    seen = f"torch {torch_version}, built for {built}"
    if driver is None:
        if on_gpu or not cuda:
            return ok("torch", seen)
        return warning(
            "torch",
            f"{seen}, and no driver answers here: it computes on the CPU",
            "install the NVIDIA driver (in a container: start it with --gpus all), or ignore this on a machine without"
            " GPUs",
        )
    seen += f"; driver {driver[0]} for CUDA up to {driver[1]}"
    if not cuda:
        return problem(
            "torch",
            f"{seen}: the GPUs are not used",
            "install a CUDA build: pip install torch --index-url https://download.pytorch.org/whl/cuXYZ, not above the"
            " driver's CUDA",
        )
    if _major(cuda) > _major(driver[1]):
        return problem(
            "torch", seen, f"update the driver to one for CUDA {_major(cuda)}, or install torch for CUDA {driver[1]}"
        )
    if not on_gpu:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        return problem(
            "torch",
            f"{seen}, and torch finds no GPU (CUDA_VISIBLE_DEVICES={visible})",
            "unset CUDA_VISIBLE_DEVICES, give the container its devices (--gpus all), and see `dmesg | grep -i nvrm`",
        )
    return _kernels(seen)


def _kernels(seen: str) -> Finding:
    """On GPUs: whether this build of torch holds kernels for them, and which NCCL it brings."""
    import torch

    seen += f"; NCCL {'.'.join(map(str, _nccl_version()))}"
    built = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if torch.version.cuda and not has_kernels(built, *capability):
            return problem(
                "torch",
                f"{seen}; it has no kernels for {torch.cuda.get_device_name(index)} (compute capability"
                f" {capability[0]}.{capability[1]}, built for {', '.join(built)})",
                "install a build of torch for this GPU (newer for a new GPU, older for an old one)",
            )
    return ok("torch", seen)


def _nccl_version() -> tuple[int, ...]:
    import torch

    if not torch.distributed.is_nccl_available():
        return (0,)
    found: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return found


def has_kernels(built: Sequence[str], major: int, minor: int) -> bool:
    """Whether a GPU of this compute capability finds kernels in a build for `built`, such as sm_90a, or compute_90:
    what the driver can compile for that GPU and later ones."""
    for name in built:
        kind, _, digits = name.partition("_")
        number = int(digits.rstrip("af") or 0)
        if kind == "sm" and number // 10 == major and number % 10 <= minor:
            return True
        if kind == "compute" and number <= 10 * major + minor:
            return True
    return False


def _major(cuda: str | None) -> int:
    """Of a CUDA version such as 12.4; 0 of none."""
    found = re.match(r"\d+", cuda or "")
    return int(found[0]) if found else 0


def _bf16(on_gpu: bool) -> Finding:
    import torch

    if on_gpu:
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return ok("bf16", "in hardware")
        return warning(
            "bf16",
            f"{torch.cuda.get_device_name()} computes no bf16 in hardware",
            "train with precision=fp16 or fp32 there; models that were trained in bf16 (T5) only with fp32",
        )
    flags = set(re.findall(r"\b(?:avx512_bf16|amx_bf16)\b", cpu_information()))
    how = f"in hardware ({', '.join(sorted(flags))})" if flags else "computed through fp32, so no faster than it"
    return ok("bf16", f"on this CPU {how}")


def cpu_information() -> str:
    """/proc/cpuinfo; "" where there is none."""
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace") if path.exists() else ""


def _attention(on_gpu: bool) -> Finding:
    """Which kernels of scaled dot-product attention run for a small bf16 (else fp16) batch, tried one by one."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    where = "cuda" if on_gpu else "cpu"
    dtype = torch.float16 if on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False) else torch.bfloat16
    query = torch.zeros(1, 2, 16, 64, dtype=dtype, device=where)
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "plain": SDPBackend.MATH,
    }
    working = []
    for name, backend in backends.items():
        try:
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
            working.append(name)
        except RuntimeError:
            continue  # this device or build has no such kernel
    seen = f"kernels that run on {where}: {', '.join(working) or 'none'}"
    if "flash" in working or not on_gpu:
        return ok("attention", seen)
    return warning(
        "attention",
        f"{seen}: no flash attention",
        "long sequences take more memory and time; GPUs before Ampere have none, others need a CUDA build of torch",
    )


def deepspeed() -> list[Finding]:
    """Whether the ZeRO engine can be imported."""
    try:
        import trainer.engine.zero  # noqa: F401
    except Exception as error:  # whatever stops it would stop training
        return [
            problem(
                "deepspeed",
                f"cannot be imported: {type(error).__name__}: {error}",
                "bash scripts/setup.sh; until then train with engine=plain",
            )
        ]
    return [ok("deepspeed", f"{version('deepspeed')}, accelerator {os.environ.get('DS_ACCELERATOR')}")]


def compilers() -> list[Finding]:
    """What builds code at first use: engine.compile, DeepSpeed's operations."""
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"])), None)
    return [_compiler(compiler), _ninja(), _nvcc(), _libaio(compiler)]


def _compiler(compiler: str | None) -> Finding:
    if compiler is None:
        return warning(
            "compiler",
            "no C++ compiler on PATH ($CXX, c++, g++, clang++)",
            "apt-get install g++ (Fedora: dnf install gcc-c++), or set CXX; engine.compile=true and engine=zero3_nvme"
            " build code at first use",
        )
    python = f"-I{sysconfig.get_path('include')}"
    said = _compile(compiler, "#include <vector>\n#include <Python.h>\n", python)
    if said:
        return warning(
            "compiler",
            f"{compiler} does not compile: {said}",
            "apt-get install g++ python3-dev, for the Python in use",
        )
    return ok("compiler", f"{compiler} compiles, with Python's headers")


def _compile(compiler: str, source: str, *flags: str) -> str:
    """ "" where `compiler` takes `source`, else what it says first."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "try.cpp")
        path.write_text(source)
        command = [compiler, "-fsyntax-only", *flags, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
    return lines[0].strip() if lines else f"exit code {done.returncode}"


def _ninja() -> Finding:
    path = shutil.which("ninja")
    if path is None:
        return warning(
            "ninja",
            "not on PATH",
            "pip install ninja, and put the environment's bin folder on PATH; DeepSpeed builds its operations with it",
        )
    return ok("ninja", path)


def _nvcc() -> Finding:
    """Whether CUDA code can be compiled: DeepSpeed refuses a toolkit of another major version than torch's."""
    cuda = torch_facts().get("cuda")
    if not cuda:
        return skipped("nvcc", "not needed: torch is no CUDA build")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    path = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    cure = (
        f"install the CUDA {cuda} toolkit and set CUDA_HOME to it; nothing needs it but DeepSpeed's own CUDA operations"
    )
    if path is None:
        return warning("nvcc", f"neither in {home}/bin nor on PATH", cure)
    done = subprocess.run([path, "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    toolkit = found[1] if found else "unknown"
    if _major(toolkit) != _major(cuda):
        return warning("nvcc", f"{path} is CUDA {toolkit}, torch is built for {cuda}: DeepSpeed refuses it", cure)
    return ok("nvcc", f"{path}, CUDA {toolkit}, fits torch's {cuda}")


def torch_facts() -> Mapping[str, str | None]:
    """torch.version as a dictionary (`cuda`, `hip`), without the time that importing torch takes; {} without torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return {}
    return runpy.run_path(str(Path(spec.origin).parent / "version.py"))


def _libaio(compiler: str | None) -> Finding:
    cure = "apt-get install libaio-dev, before engine=zero3_nvme"
    if compiler is None:
        return skipped("libaio", "no compiler to look for its headers with", cure)
    if _compile(compiler, "#include <libaio.h>\n"):
        return ok("libaio", "its headers are not installed; only engine=zero3_nvme needs them", cure)
    return ok("libaio", "its headers are there")
