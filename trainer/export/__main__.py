"""A trained run as a folder that transformers loads: `python -m trainer.export run=NAME to=DIR`.

With encrypt=true the weights are encrypted with the age identity in key_file=FILE or in SHARDWRIGHT_EXPORT_KEY;
`decrypt=DIR to=DIR2` is the way back. Adapters that a run trained (model.lora) are merged into the weights, or with
adapters=true written by themselves, as peft has them.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.commands import run_command
from trainer.config import Precision
from trainer.errors import ConfigError, SetupError
from trainer.export.beside import other_penalty, write_beside
from trainer.export.compare import compare
from trainer.export.sealed import identity_from, seal, unseal
from trainer.export.weights import write_weights
from trainer.formats.catalogue import format_of

if TYPE_CHECKING:
    from trainer.restore import FoundRun


@dataclass(frozen=True)
class ExportOptions:
    """Arguments of `python -m trainer.export`."""

    to: str
    run: str | None = None
    runs_dir: str = "runs"
    checkpoint: str = "latest"
    weights: str = "master"
    allow_targets: list[str] = field(default_factory=list)
    dtype: str = "bf16"
    max_shard_gb: float = 5.0
    adapters: bool = False
    compare: bool = True
    encrypt: bool = False
    decrypt: str | None = None
    key_file: str | None = None


def _export(options: ExportOptions) -> None:
    if (options.run is None) == (options.decrypt is None):
        raise ConfigError("Give either run=NAME to export a run, or decrypt=DIR to decrypt an export.")
    to = Path(options.to)
    if to.exists():
        raise ConfigError(f"to={to} exists already; name a new folder.")
    if options.decrypt:
        print(_new_folder(to, lambda folder: _decrypt(options, folder)))
        return
    found = _find(options)
    print(_new_folder(to, lambda folder: _write(options, found, folder)), flush=True)
    from trainer.metrics.wandb.lineage import tell

    used = {"to": options.to, "dtype": options.dtype, "weights": options.weights, "adapters": options.adapters}
    tell("export", found.config, found.directory.path, found.steps, used, export=to)


def _new_folder(to: Path, write: Callable[[Path], str]) -> str:
    """Let `write` fill a folder that becomes `to` when it is whole, and is gone otherwise."""
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        told = write(partial)
        partial.rename(to)
    except OSError as error:
        raise SetupError(f"to={to} cannot be written: {error}; make room or choose another folder.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return f"{to}: {told}"


def _decrypt(options: ExportOptions, folder: Path) -> str:
    sealed = Path(str(options.decrypt))
    if not sealed.is_dir():
        raise ConfigError(f"decrypt={sealed} is no folder.")
    unseal(sealed, folder, identity_from(options.key_file))
    return f"decrypted from {sealed}"


def _find(options: ExportOptions) -> FoundRun:
    if options.dtype not in Precision.__members__:
        raise ConfigError(f"dtype={options.dtype} is not one of {', '.join(Precision)}.")
    if options.max_shard_gb <= 0:
        raise ConfigError(f"max_shard_gb={options.max_shard_gb:g} is not above 0; 5 is usual.")
    from trainer.export.adapters import has_adapters
    from trainer.restore import find_run

    found = find_run(str(options.run), options.runs_dir, options.checkpoint, options.allow_targets, options.weights)
    if options.adapters and not has_adapters(found.config):
        raise ConfigError(f"adapters=true: the run {options.run} has none (model.lora); export it without.")
    return found


def _write(options: ExportOptions, found: FoundRun, folder: Path) -> str:
    from trainer.parts import DTYPES

    identity = identity_from(options.key_file) if options.encrypt else None
    dtype = DTYPES[Precision(options.dtype)]
    files, told = (_write_adapters if options.adapters else _write_whole)(options, found, folder, dtype)
    if identity is not None:
        seal(files, identity)
        told += "; weights encrypted (age)"
    return told


def _write_whole(options: ExportOptions, found: FoundRun, folder: Path, dtype: torch.dtype) -> tuple[list[Path], str]:
    """The files of weights, and what is to be said of them; adapters are merged."""
    from trainer.export.adapters import has_adapters, merged_source, without_adapters
    from trainer.restore import load_model

    form = format_of(without_adapters(found.config.model), found.tokenizer)
    with found.reader() as reader:
        source = merged_source(found, reader, form) if has_adapters(found.config) else reader
        files = write_weights(source, form, folder, dtype, int(options.max_shard_gb * 1e9))
    write_beside(folder, found, form, str(dtype).removeprefix("torch."))
    told = f"{form.architecture}, {sum(path.stat().st_size for path in files):,} bytes of weights in {len(files)} files"
    if options.compare:
        model: Any = load_model(found)
        if has_adapters(found.config):
            model.model = model.model.merge_and_unload()
        told += f"; logits equal to {compare(model, form, folder, dtype):.0e} of the largest"
    if form.config.get("is_encoder_decoder") and (penalty := other_penalty(found.config.task)):
        told += f"\nbeam search: {penalty}"
    return files, told


def _write_adapters(
    options: ExportOptions, found: FoundRun, folder: Path, dtype: torch.dtype
) -> tuple[list[Path], str]:
    """The same, of adapters by themselves."""
    from trainer.export.adapters import base_of, without_adapters, write_adapters
    from trainer.restore import load_model

    form, base = format_of(without_adapters(found.config.model), found.tokenizer), base_of(found.config)
    with found.reader() as reader:
        files = write_adapters(folder, found, reader, dtype)
    write_beside(folder, found, form, str(dtype).removeprefix("torch."), base)
    told = f"adapters of {base} ({form.architecture}), {files[0].stat().st_size:,} bytes"
    if options.compare:
        told += f"; logits equal to {compare(load_model(found), form, folder, dtype, base):.0e} of the largest"
    return files, told


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(ExportOptions, _export, str(__doc__), argv)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
