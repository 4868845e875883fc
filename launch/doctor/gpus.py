"""The GPUs as their driver describes them: what `nvidia-smi -q -x` prints (seen of drivers 515 to 590)."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from launch.doctor.findings import Finding, ok, problem, skipped, warning

_SECONDS = 20.0  # a driver that starts up without persistence takes a few
_SLOWED = {  # by the end of an element's name; hardware first
    "hw_thermal_slowdown": "slowed by its hardware: too hot",
    "hw_power_brake_slowdown": "slowed by its hardware: power brake",
    "hw_slowdown": "slowed by its hardware",
    "sw_thermal_slowdown": "slowed by the driver: too hot",
}
_MUCH_MEMORY_MIB = 1024  # taken by others before we start


class NvidiaSmiError(RuntimeError):
    """nvidia-smi is there and does not answer as it should; holds its words."""


def nvidia_smi() -> Element | None:
    """What the driver says of all its GPUs; None where there is no nvidia-smi or it fails."""
    try:
        return ask_driver()
    except NvidiaSmiError:
        return None


def ask_driver() -> Element | None:
    """The same; None without nvidia-smi on PATH, NvidiaSmiError where it fails."""
    path = shutil.which("nvidia-smi")
    if path is None:
        return None
    try:
        done = subprocess.run([path, "-q", "-x"], capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NvidiaSmiError(str(error)) from error
    try:
        return ElementTree.fromstring(done.stdout)
    except ElementTree.ParseError as error:
        said = (done.stdout + done.stderr).strip() or f"exit code {done.returncode} without a word"
        raise NvidiaSmiError(said.splitlines()[0]) from error


def gpus() -> list[Finding]:
    """Count, memory, errors, throttling, links and use of the NVIDIA GPUs."""
    try:
        log = ask_driver()
    except NvidiaSmiError as error:
        return [
            problem(
                "gpus",
                f"nvidia-smi fails: {error}",
                "after an update of the driver: reboot, or reload its modules; for a lost GPU: reset it (nvidia-smi -r)"
                " or reboot, and see `dmesg | grep -i xid`",
            )
        ]
    if log is None:
        return [_no_driver()]
    found = log.findall("gpu")
    if not found:
        return [problem("gpus", "the driver answers, and knows no GPU", "give the container its GPUs: --gpus all")]
    return [_count(found), *(_over(found, *area) for area in _AREAS)]


def _no_driver() -> Finding:
    if Path("/dev/nvidiactl").exists():
        return warning(
            "gpus",
            "there are NVIDIA devices and no nvidia-smi on PATH, so errors and throttling cannot be read",
            "add the driver's tools to PATH (in a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility)",
        )
    amd = Path("/dev/kfd").exists()
    seen = "AMD GPUs; errors and throttling are read of NVIDIA's alone" if amd else "none here (no nvidia-smi on PATH)"
    return skipped("gpus", seen)


def _count(found: list[Element]) -> Finding:
    names = Counter(f"{gpu.findtext('product_name')} {_memory(gpu)}" for gpu in found)
    seen = ", ".join(f"{count} x {name}" for name, count in names.items())
    if len(names) > 1:
        return warning(
            "gpus",
            f"of different kinds: {seen}",
            "choose those alike with CUDA_VISIBLE_DEVICES: the slowest sets the pace",
        )
    return ok("gpus", seen, figures={"count": len(found)})


def _memory(gpu: Element) -> str:
    return f"{_number(gpu.findtext('fb_memory_usage/total')) / 1024:.0f} GiB"


def _over(
    found: list[Element], name: str, well: str, signs: Callable[[Element], Iterator[tuple[str, str, str]]]
) -> Finding:
    """One finding on all GPUs of what `signs` yields of each: (state, what is seen, cure)."""
    told = [(index, sign) for index, gpu in enumerate(found) for sign in signs(gpu)]
    if not told:
        return ok(name, well)
    seen = "; ".join(f"GPU {index} {what}" for index, (_, what, _) in told)
    cures = "; ".join(dict.fromkeys(cure for _, (_, _, cure) in told))
    grave = any(state == "problem" for _, (state, _, _) in told)
    return (problem if grave else warning)(name, seen, cures)


def _memory_errors(gpu: Element) -> Iterator[tuple[str, str, str]]:
    now, ever = (_uncorrected(gpu, span) for span in ("volatile", "aggregate"))
    if now:
        cure = (
            "take it out of use, reset it (nvidia-smi -r) or reboot, and run its vendor's diagnostics (dcgmi diag -r 3)"
        )
        yield "problem", f"has had {now} uncorrectable memory errors since its driver started", cure
    elif ever:
        yield (
            "warning",
            f"has had {ever} uncorrectable memory errors in its life, none since the start",
            ("watch it; if more come, have it replaced"),
        )
    if "Yes" in (
        gpu.findtext("remapped_rows/remapped_row_failure"),
        gpu.findtext("ecc_errors/aggregate/sram_threshold_exceeded"),
        gpu.findtext("ecc_errors/unrepairable_memory"),
    ):
        yield "problem", "cannot mend its memory any more", "have it replaced"
    if "Yes" in (
        gpu.findtext("remapped_rows/remapped_row_pending"),
        gpu.findtext("retired_pages/pending_retirement"),
        gpu.findtext("ecc_errors/channel_repair_pending"),
        gpu.findtext("ecc_errors/tpc_repair_pending"),
        gpu.findtext("gpu_reset_status/reset_required"),
    ):
        yield "warning", "waits for a reset to mend its memory", "reset it while idle: nvidia-smi -r, or reboot"
    action = gpu.findtext("gpu_recovery_action", "None")  # of drivers since 570
    if action not in ("None", "N/A"):
        yield "problem", f"is to be recovered, says its driver: {action}", "take it out of use, and do what it says"
    if gpu.findtext("ecc_mode/current_ecc") == "Disabled":
        yield "warning", "has its memory's error correction off", "nvidia-smi -e 1, then reboot"


def _uncorrected(gpu: Element, span: str) -> int:
    """Errors of all kinds of memory in `span`, however finely this driver tells them apart.

    They name SRAM and DRAM, and SRAM by parity and SECDED since 550.
    """
    counts = {child.tag: _number(child.text) for child in gpu.findall(f"ecc_errors/{span}/*")}
    return int(sum(count for tag, count in counts.items() if "uncorrectable" in tag))


def _clocks(gpu: Element) -> Iterator[tuple[str, str, str]]:
    reasons = [*gpu.findall("clocks_event_reasons/*"), *gpu.findall("clocks_throttle_reasons/*")]
    active = {child.tag for child in reasons if (child.text or "").strip() == "Active"}
    cure = "see to its cooling and power supply (nvidia-smi -q -d TEMPERATURE,POWER), then look again under load"
    for ending, meaning in _SLOWED.items():
        if any(tag.endswith(f"reason_{ending}") for tag in active):
            yield "problem" if ending.startswith("hw") else "warning", f"is {meaning}", cure
            break  # the first says more than those after it
    for child in gpu.findall("clocks_event_reasons_counters/*"):
        seconds = _number(child.text) / 1e6
        if child.tag.rpartition("counters_")[2].startswith("hw_") and seconds > 60:
            yield "warning", f"was slowed by its hardware for {seconds:.0f} s since its driver started", cure


def _links(gpu: Element) -> Iterator[tuple[str, str, str]]:
    widths = gpu.find("pci/pci_gpu_link_info/link_widths")
    if widths is not None:
        now, most = (_number(widths.findtext(f"{which}_link_width")) for which in ("current", "max"))
        if now < most:
            cure = "seat it again, or put it into another slot: host memory and other GPUs are that much farther away"
            yield "warning", f"uses {now:.0f} of {most:.0f} PCIe lanes", cure
    state, status = gpu.findtext("fabric/state", "N/A"), gpu.findtext("fabric/status", "N/A")
    if state not in ("N/A", "Completed") or (state == "Completed" and status not in ("N/A", "Success")):
        cure = (
            "systemctl restart nvidia-fabricmanager, of the same version as the driver; without it CUDA does not start"
        )
        yield "problem", f"has not joined the NVSwitch fabric ({state}, {status})", cure
    if gpu.findtext("mig_mode/current_mig") == "Enabled":
        cure = "nvidia-smi -mig 0, unless each run is to have one instance: NCCL does not connect instances of one GPU"
        yield "warning", "is cut into instances (MIG)", cure


def _use(gpu: Element) -> Iterator[tuple[str, str, str]]:
    used = _number(gpu.findtext("fb_memory_usage/used"))
    if used > _MUCH_MEMORY_MIB:
        owners = [
            f"{process.findtext('process_name')} ({process.findtext('pid')})"
            for process in gpu.findall("processes/process_info")
        ]
        whose = f" by {', '.join(owners)}" if owners else ""
        cure = "end what uses them, or choose others with CUDA_VISIBLE_DEVICES; nvidia-smi shows who"
        yield "warning", f"has {used / 1024:.1f} GiB in use{whose}", cure
    if gpu.findtext("compute_mode") == "Prohibited":
        yield "problem", "takes no computation (compute mode Prohibited)", "nvidia-smi -c DEFAULT"


_AREAS = (
    ("gpu-memory", "no uncorrectable errors, no repair pending", _memory_errors),
    ("gpu-clocks", "no thermal or power slowdown", _clocks),
    ("gpu-links", "all PCIe lanes, no fabric or MIG in the way", _links),
    ("gpu-use", "free", _use),
)


def _number(text: str | None) -> float:
    """The leading number of `80 MiB`, `16x`, `3 us`; 0 of N/A and of nothing."""
    digits = (text or "").strip().split(" ")[0].rstrip("x")
    return float(digits) if digits.replace(".", "", 1).isdigit() else 0.0
