"""A trained run as a folder that transformers loads: `python -m trainer.export run=NAME to=DIR`.

With encrypt=true the weights are encrypted with the age identity in key_file=FILE or in SHARDWRIGHT_EXPORT_KEY;
`decrypt=DIR to=DIR2` is the way back.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainer.checkpoint.load import Reader
from trainer.commands import run_command
from trainer.config import Precision
from trainer.errors import ConfigError, SetupError
from trainer.export.compare import compare
from trainer.export.sealed import identity_from, seal, unseal
from trainer.export.weights import write_weights
from trainer.formats import Format
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
    allow_targets: list[str] = field(default_factory=list)
    dtype: str = "bf16"
    max_shard_gb: float = 5.0
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
    print(_new_folder(to, lambda folder: _decrypt(options, folder) if options.decrypt else _write(options, folder)))


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


def _write(options: ExportOptions, folder: Path) -> str:
    if options.dtype not in Precision.__members__:
        raise ConfigError(f"dtype={options.dtype} is not one of {', '.join(Precision)}.")
    if options.max_shard_gb <= 0:
        raise ConfigError(f"max_shard_gb={options.max_shard_gb:g} is not above 0; 5 is usual.")
    from trainer.parts import DTYPES
    from trainer.restore import find_run, load_model

    identity = identity_from(options.key_file) if options.encrypt else None
    found = find_run(str(options.run), options.runs_dir, options.checkpoint, options.allow_targets)
    form, dtype = format_of(found.config.model, found.tokenizer), DTYPES[Precision(options.dtype)]
    with Reader(found.checkpoint) as reader:
        files = write_weights(reader, form, folder, dtype, int(options.max_shard_gb * 1e9))
    _write_json(folder / "config.json", {**form.config, "dtype": str(dtype).removeprefix("torch.")})
    _write_tokenizer(folder, found, form)
    (folder / "README.md").write_text(_card(found, form), encoding="utf-8")
    told = f"{form.architecture}, {sum(path.stat().st_size for path in files):,} bytes of weights in {len(files)} files"
    if options.compare:
        difference = compare(load_model(found), form, folder, dtype)
        told += f"; logits equal to {difference:.0e} of the largest"
    if identity is not None:
        seal(files, identity)
        told += "; weights encrypted (age)"
    return told


def _write_tokenizer(folder: Path, found: FoundRun, form: Format) -> None:
    """tokenizer.json as the run has it, and what transformers wants to know besides."""
    tokenizer = found.tokenizer
    if tokenizer is None:
        return
    (tokenizer.between_ends() if form.between_ends else tokenizer).save(folder / "tokenizer.json")
    tokens = {"pad_token": tokenizer.pad_id, "bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    if form.between_ends:
        tokens |= {"cls_token": tokenizer.bos_id, "sep_token": tokenizer.eos_id}
    if tokenizer.mask_id is not None:
        tokens["mask_token"] = tokenizer.mask_id
    named = {name: tokenizer.token_of(id_) for name, id_ in tokens.items()}
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named})
    special = {key: value for key, value in form.config.items() if key.endswith("_token_id")}
    _write_json(folder / "generation_config.json", special)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _card(found: FoundRun, form: Format) -> str:
    """The model card: where the weights come from."""
    task = found.config.task["_target_"].rpartition(".")[2]
    return (
        f"---\nlibrary_name: transformers\n---\n\n# {found.config.name}\n\n"
        f"{form.architecture}, trained by Shardwright for {found.checkpoint.state.step:,} steps on"
        f" {found.checkpoint.state.tokens:,} target tokens (task {task}, seed {found.config.seed}).\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(ExportOptions, _export, str(__doc__), argv)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
