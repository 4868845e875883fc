"""How fast each device multiplies matrices and moves memory, beside what its kind should do and its neighbours do."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

from launch.doctor.findings import Finding, gigabytes, ok, problem, skipped, warning
from launch.doctor.software import cpu_information
from trainer.metrics.meter import peak_flops

BYTES_PER_SECOND = {
    "V100": 900e9,
    "A100-SXM4-40GB": 1555e9,
    "A100-PCIE-40GB": 1555e9,
    "A100 80GB": 1935e9,
    "A100-SXM4-80GB": 2039e9,
    "H100 PCIe": 2000e9,
    "H100": 3350e9,
    "H200": 4800e9,
    "B200": 8000e9,
    "MI300X": 5300e9,
}
"""Of device memory, by words in the device's name, the narrower before the wider (vendors' data sheets)."""

_GOOD_SHARE = {"matrix": 0.45, "memory": 0.6, "cpu": 0.15}
"""Of the published peak. A large bf16 product reaches 60 to 75 % of it and a copy 80 to 90 %; on a CPU the peak counts
every core with two full vector units, which shared and virtual cores do not have."""

_ALIKE = 0.85  # devices of a kind differ by a few percent


def gpu_count() -> int:
    """GPUs that torch sees; it is not imported where there can be none."""
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def speed() -> list[Finding]:
    """Matrix products and copies on each GPU, or on the CPU."""
    import torch

    if torch.cuda.is_available():
        return _gpu_speed()
    return [_cpu_speed()]


def peers() -> list[Finding]:
    """Whether each GPU reaches each other's memory directly."""
    count = gpu_count()
    if count < 2:
        return [skipped("peer-access", "fewer than two GPUs")]
    import torch

    pairs = [(one, other) for one in range(count) for other in range(count) if one != other]
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if not apart:
        return [ok("peer-access", f"each of {count} GPUs reaches each other")]
    seen = f"{len(apart)} of {len(pairs)} pairs do not reach each other: {', '.join(map(str, apart[:8]))}"
    cure = (
        "switch off ACS and the IOMMU for them in the BIOS; with cards that have no links NCCL goes through host memory"
    )
    return [warning("peer-access", seen, cure)]


def _cpu_speed() -> Finding:
    import torch

    size = 1536
    figures = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
        seconds = _best(lambda left=left, right=right: left @ right, 0.3)  # type: ignore[misc]
        figures[f"{str(dtype).removeprefix('torch.')}_flops_per_second"] = 2 * size**3 / seconds
    source = torch.ones(32 << 20)  # larger than caches
    target = torch.empty_like(source)
    figures["memory_bytes_per_second"] = 2 * source.nbytes / _best(lambda: target.copy_(source), 0.3)
    fp32, peak = figures["float32_flops_per_second"], cpu_peak(cpu_information(), torch.get_num_threads())
    seen = (
        f"{torch.get_num_threads()} threads: {fp32 / 1e9:.0f} GFLOP/s in fp32,"
        f" {figures['bfloat16_flops_per_second'] / 1e9:.0f} in bf16; memory"
        f" {gigabytes(figures['memory_bytes_per_second'])}/s"
    )
    if peak is None:
        return ok("cpu-speed", f"{seen}; the peak of this CPU is not known", figures=figures)
    seen += f"; fp32 is {fp32 / peak:.0%} of the peak of {peak / 1e9:.0f}"
    if fp32 >= _GOOD_SHARE["cpu"] * peak:
        return ok("cpu-speed", seen, figures=figures)
    cure = "end what else computes here (top), set OMP_NUM_THREADS to the cores there are, ask for whole cores"
    return warning("cpu-speed", seen, cure, figures)


def cpu_peak(information: str, threads: int) -> float | None:
    """fp32 FLOP/s of `threads` cores by the text of /proc/cpuinfo.

    Clock x vector lanes x 2 units x 2 (multiply and add).

    None where it names no clock (ARM), or no vectors that we know.
    """
    clocks = [float(text) for text in re.findall(r"cpu MHz\s*: ([\d.]+)", information)]
    lanes = 16 if "avx512f" in information else 8 if "avx2" in information else None
    return max(clocks) * 1e6 * threads * lanes * 2 * 2 if clocks and lanes else None


def _best(action: Callable[[], object], seconds: float, wait: Callable[[], object] = lambda: None) -> float:
    """Seconds of the quickest of the repetitions that fit `seconds`, after one that does not count."""
    action()
    wait()
    end, best = time.perf_counter() + seconds, float("inf")
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        action()
        wait()
        best = min(best, time.perf_counter() - start)
    return best


def _gpu_speed() -> list[Finding]:
    import torch

    measured = {index: _measure_gpu(index) for index in range(torch.cuda.device_count())}
    names = {index: torch.cuda.get_device_name(index) for index in measured}
    judged = [judge_gpu(f"GPU {index}", names[index], figures) for index, figures in measured.items()]
    return [*judged, *compare({f"GPU {index}": figures for index, figures in measured.items()})]


def _measure_gpu(index: int) -> dict[str, float]:
    """bf16 (fp16 before Ampere) products, copies within the device and from the host; `differing` counts products of
    the same matrices that were not the same."""
    import torch

    bf16 = torch.cuda.get_device_capability(index) >= (8, 0) or torch.version.hip is not None
    device, size = torch.device("cuda", index), 8192
    with torch.cuda.device(device):
        wait = torch.cuda.synchronize
        left, right = (
            torch.randn(size, size, device=device).to(torch.bfloat16 if bf16 else torch.float16) for _ in range(2)
        )
        product = left @ right
        differing = sum(not torch.equal(product, left @ right) for _ in range(3))
        matrix = _best(lambda: torch.mm(left, right, out=product), 0.5, wait)
        source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy = _best(lambda: target.copy_(source), 0.2, wait)
        pinned = torch.empty(256 << 20, dtype=torch.uint8).pin_memory()
        upload = _best(lambda: target[: pinned.numel()].copy_(pinned, non_blocking=True), 0.2, wait)
    return {
        "flops_per_second": 2 * size**3 / matrix,
        "memory_bytes_per_second": 2 * source.nbytes / copy,
        "host_bytes_per_second": pinned.nbytes / upload,
        "differing_products": differing,
    }


def judge_gpu(label: str, name: str, figures: Mapping[str, float]) -> Finding:
    """What a GPU called `name` did, against the published peak of its kind."""
    matrix, memory = figures["flops_per_second"], figures["memory_bytes_per_second"]
    peak = peak_flops(name)
    published = next((rate for words, rate in BYTES_PER_SECOND.items() if words in name), None)
    seen = (
        f"{label}, {name}: {matrix / 1e12:.0f} TFLOP/s{_share(matrix, peak)}, memory"
        f" {memory / 1e9:.0f} GB/s{_share(memory, published)}, from the host"
        f" {figures['host_bytes_per_second'] / 1e9:.1f} GB/s"
    )
    if figures["differing_products"]:
        cure = "take it out of use: it computes wrongly; run its vendor's diagnostics (dcgmi diag -r 3)"
        return problem("gpu-speed", f"{seen}; the same product came out differently", cure, figures)
    slow = [
        what
        for what, rate, most in (("matrix", matrix, peak), ("memory", memory, published))
        if most is not None and rate < _GOOD_SHARE[what] * most
    ]
    if slow:
        cure = "see who else uses it, its clocks and temperature (nvidia-smi -q -d CLOCK,TEMPERATURE,PERFORMANCE)"
        return warning("gpu-speed", f"{seen}: slow ({', '.join(slow)})", cure, figures)
    return ok("gpu-speed", seen, figures=figures)


def _share(rate: float, peak: float | None) -> str:
    return "" if peak is None else f" ({rate / peak:.0%} of its peak)"


def compare(measured: Mapping[str, Mapping[str, float]]) -> list[Finding]:
    """Outliers among devices, by label: those below 85 % of the median of all, in anything that counts per second."""
    findings = []
    for key in next(iter(measured.values()), {}):
        rates = {label: figures[key] for label, figures in measured.items() if key in figures}
        if not key.endswith("_per_second") or len(rates) < 2:
            continue
        usual = median(rates.values()) if len(rates) > 2 else max(rates.values())
        slow = {label: rate / usual for label, rate in rates.items() if rate < _ALIKE * usual}
        if slow:
            told = ", ".join(f"{label} at {share:.0%}" for label, share in slow.items())
            cure = "every step waits for the slowest: see to its cooling, power and neighbours, or leave it out"
            what = key.removesuffix("_per_second").replace("_", " ")
            findings.append(warning("slow-devices", f"{what}: {told} of the others' pace", cure))
    return findings
