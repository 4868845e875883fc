"""Settings of the environment that spoil a run: the locale, and switches left on from hunting a fault."""

from __future__ import annotations

import locale
import os
import sys

from launch.doctor.findings import Finding, ok, warning

_SLOW = {
    "CUDA_LAUNCH_BLOCKING": ("0", "every kernel waits for the one before it"),
    "NCCL_P2P_DISABLE": ("0", "GPUs of a node talk through host memory"),
    "NCCL_SHM_DISABLE": ("0", "GPUs of a node talk through the network"),
    "NCCL_IB_DISABLE": ("0", "nodes talk over TCP even where there is InfiniBand"),
    "TORCH_DISTRIBUTED_DEBUG": ("OFF", "every collective is checked by another"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": ("0", "every tensor is taken from the driver"),
    "TORCH_SHOW_CPP_STACKTRACES": ("0", "errors carry long traces"),
    "PYTHONDEVMODE": ("", "Python checks itself"),
    "PYTHONASYNCIODEBUG": ("", "Python checks itself"),
}
"""Variable: (the value that is harmless, what any other does)."""


def text() -> list[Finding]:
    """Whether text files and names are UTF-8 by default."""
    encodings = {locale.getpreferredencoding(False), sys.getfilesystemencoding(), sys.stdout.encoding}
    wrong = sorted(name for name in encodings if name.lower().replace("-", "") != "utf8")
    if wrong:
        return [warning("locale", f"text is {', '.join(wrong)}", "export LC_ALL=C.UTF-8 (or PYTHONUTF8=1)")]
    return [ok("locale", "UTF-8")]


def settings() -> list[Finding]:
    """Variables that make training slow, left on from hunting a fault."""
    on = {
        name: meaning
        for name, (harmless, meaning) in _SLOW.items()
        if os.environ.get(name, harmless).upper() not in (harmless, "")
    }
    if os.environ.get("NCCL_DEBUG", "").upper() == "TRACE":
        on["NCCL_DEBUG"] = "every call is logged"
    if not on:
        return [ok("settings", "no debugging switches are on")]
    seen = "; ".join(f"{name}={os.environ[name]}: {meaning}" for name, meaning in on.items())
    return [warning("settings", seen, f"unset {' '.join(on)}, unless you need it")]
