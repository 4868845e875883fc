"""DeepSpeed's reader and writer of disks, compiled in a quarter of the time: nearly all of it goes into reading torch's
headers, once a source file, so the files become one."""

from __future__ import annotations

from pathlib import Path


def builders():
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.ops.op_builder.pin_memory import PinMemoryBuilder

    return [PinMemoryBuilder, AsyncIOBuilder]


def copy_sources(folder: Path) -> None:
    """DeepSpeed's sources with headers that may be read twice, and for each builder a file that includes its own."""
    for kind in builders():
        builder = kind()
        csrc = Path(builder.deepspeed_src_path("csrc"))
        for path in (path for part in ("aio", "pin_memory") for path in (csrc / part).rglob("*.[ch]*")):
            guard = "#pragma once\n" if path.suffix == ".h" else ""
            _write(folder / "csrc" / path.relative_to(csrc), guard + path.read_text())
        whole = (f'#include "{folder / source}"\n' for source in builder.sources() if not _apart(source))
        _write(folder / f"{builder.name}.cpp", "".join(whole))


def use_sources(folder: Path) -> None:
    """What this process compiles from now on is what `copy_sources` has left in `folder`."""
    for kind in builders():
        builder = kind()
        sources = [folder / f"{builder.name}.cpp", *(folder / path for path in builder.sources() if _apart(path))]
        paths = {"sources": sources, "include_paths": [folder / path for path in builder.include_paths()]}
        for name, value in paths.items():
            setattr(kind, name, lambda self, value=value: [str(path) for path in value])
        flags = [*builder.cxx_args(), "-O0", "-g0"]
        kind.cxx_args = lambda self, flags=flags: flags


def _apart(source: str) -> bool:
    """Their constants have the same names; they read no header of torch."""
    return "aio/common" in source


def _write(path: Path, text: str) -> None:
    """What has not changed is not compiled again."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
