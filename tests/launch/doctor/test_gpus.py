"""GPUs as their driver describes them, by an nvidia-smi that prints what real ones print."""

from __future__ import annotations

import pytest

from launch.doctor import gpus, software
from tests.launch.doctor.examine import examine
from tests.launch.doctor.nvidia_smi import gpu, log, old_gpu, path_with


@pytest.fixture
def look(tmp_path, monkeypatch):
    """Findings by name, of what the driver prints."""

    def look(*elements, **facts):
        monkeypatch.setenv("PATH", path_with(tmp_path, log(*elements, **facts)))
        return {finding.name: finding for finding in gpus.gpus()}

    return look


def test_a_node_in_good_order(tmp_path):
    code, found = examine("gpus", env={"PATH": path_with(tmp_path, log(gpu(0), gpu(1)))})
    assert code == 0 and {finding["state"] for finding in found.values()} == {"ok"}
    assert found["gpus"]["seen"] == "2 x NVIDIA H100 80GB HBM3 80 GiB" and found["gpus"]["figures"] == {"count": 2}


def test_errors_and_throttling_name_the_gpu_and_the_cure(tmp_path):
    bad = gpu(1, dram_uncorrectable="3", clocks_event_reason_hw_thermal_slowdown="Active")
    code, found = examine("gpus", env={"PATH": path_with(tmp_path, log(gpu(0), bad))})
    assert code == 1
    errors, clocks = found["gpu-memory"], found["gpu-clocks"]
    assert errors["state"] == "problem" and "GPU 1 has had 3 uncorrectable" in errors["seen"]
    assert "reset" in errors["cure"] and "GPU 0" not in errors["seen"]
    assert clocks["state"] == "problem" and clocks["seen"] == "GPU 1 is slowed by its hardware: too hot"


@pytest.mark.parametrize(
    "changed, name, state, seen",
    [
        ({"remapped_row_failure": "Yes"}, "gpu-memory", "problem", "cannot mend its memory"),
        ({"sram_threshold_exceeded": "Yes"}, "gpu-memory", "problem", "cannot mend its memory"),
        ({"remapped_row_pending": "Yes"}, "gpu-memory", "warning", "waits for a reset"),
        ({"unrepairable_memory": "Yes"}, "gpu-memory", "problem", "cannot mend its memory"),
        ({"tpc_repair_pending": "Yes"}, "gpu-memory", "warning", "waits for a reset"),
        ({"gpu_recovery_action": "Drain and Reset"}, "gpu-memory", "problem", "says its driver: Drain and Reset"),
        ({"reset_required": "Yes"}, "gpu-memory", "warning", "waits for a reset"),
        ({"current_ecc": "Disabled"}, "gpu-memory", "warning", "error correction off"),
        ({"clocks_event_reason_hw_power_brake_slowdown": "Active"}, "gpu-clocks", "problem", "power brake"),
        ({"clocks_event_reason_sw_thermal_slowdown": "Active"}, "gpu-clocks", "warning", "by the driver: too hot"),
        ({"clocks_event_reason_sw_power_cap": "Active"}, "gpu-clocks", "ok", "no thermal"),
        ({"clocks_event_reasons_counters_hw_therm_slowdown": "90000000 us"}, "gpu-clocks", "warning", "for 90 s"),
        ({"current_link_width": "8x"}, "gpu-links", "warning", "8 of 16 PCIe lanes"),
        ({"state": "In Progress", "status": "N/A"}, "gpu-links", "problem", "NVSwitch fabric (In Progress"),
        ({"current_mig": "Enabled"}, "gpu-links", "warning", "instances (MIG)"),
        ({"used": "40960 MiB"}, "gpu-use", "warning", "40.0 GiB in use"),
        ({"compute_mode": "Prohibited"}, "gpu-use", "problem", "no computation"),
        ({"product_name": "NVIDIA H100 NVL"}, "gpus", "warning", "of different kinds"),
    ],
)
def test_each_sign_is_seen(look, changed, name, state, seen):
    found = look(gpu(0), gpu(1, **changed))[name]
    assert found.state == state and seen in found.seen
    assert found.cure or state == "ok"


def test_errors_of_the_past_are_a_warning(look):
    text = gpu(0)
    now, ever = text.split("<aggregate>")
    ever = ever.replace("<dram_uncorrectable>0", "<dram_uncorrectable>5", 1)
    found = look(f"{now}<aggregate>{ever}")["gpu-memory"]
    assert found.state == "warning" and "5 uncorrectable memory errors in its life" in found.seen


def test_an_older_driver_is_understood(look):
    hot = old_gpu(sram_uncorrectable_parity="2", clocks_event_reason_sw_thermal_slowdown="Active")
    found = look(hot, driver="515.105.01", cuda="11.7")
    assert "2 uncorrectable" in found["gpu-memory"].seen and "too hot" in found["gpu-clocks"].seen
    assert found["gpu-links"].state == "ok", "N/A is no fault"


def test_who_uses_a_gpu_is_named(look):
    process = (
        "<processes>\n<process_info><pid>4711</pid><type>C</type><process_name>python</process_name>"
        "<used_memory>30000 MiB</used_memory></process_info>\n"
    )
    found = look(gpu(0, used="30000 MiB").replace("<processes>\n", process))["gpu-use"]
    assert "by python (4711)" in found.seen


def test_a_driver_that_fails_is_a_problem_in_its_own_words(tmp_path):
    said = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 550.54"
    code, found = examine("gpus", env={"PATH": path_with(tmp_path, said, code=18)})
    assert code == 1 and "Driver/library version mismatch" in found["gpus"]["seen"]
    assert "reboot" in found["gpus"]["cure"]


def test_without_a_driver_it_says_so(tmp_path):
    code, found = examine("gpus", env={"PATH": "/usr/bin:/bin"})
    assert code == 0 and found["gpus"]["state"] == "skipped" and "no nvidia-smi on PATH" in found["gpus"]["seen"]


@pytest.mark.parametrize(
    "built, driver, on_gpu, state, seen",
    [
        (None, "12.4", False, "problem", "the GPUs are not used"),
        ("13.0", "12.4", False, "problem", "driver 550.54.15 for CUDA up to 12.4"),
        ("12.8", "12.4", False, "problem", "torch finds no GPU"),
    ],
)
def test_torch_has_to_fit_the_driver(tmp_path, monkeypatch, built, driver, on_gpu, state, seen):
    monkeypatch.setenv("PATH", path_with(tmp_path, log(gpu(0), cuda=driver)))
    found = software.judge_build("2.13.0", built, None, on_gpu)
    assert found.state == state and seen in found.seen and found.cure


def test_a_cuda_build_without_a_driver_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = software.judge_build("2.13.0", "12.8", None, on_gpu=False)
    assert found.state == "warning" and "computes on the CPU" in found.seen


def test_kernels_for_a_compute_capability():
    built = ["sm_80", "sm_90a", "compute_90"]
    assert software.has_kernels(built, 8, 6) and software.has_kernels(built, 12, 0), "compiled by the driver"
    assert not software.has_kernels(built, 7, 0)
    assert not software.has_kernels(["sm_80", "sm_90"], 10, 0)
