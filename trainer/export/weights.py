"""Weights out of a checkpoint's shards into safetensors files of a bounded size, one of them in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file

from trainer.errors import CheckpointError
from trainer.formats import Format, Tensor

INDEX = "model.safetensors.index.json"


class Source(Protocol):
    """Where parameters are read from: a checkpoint (`trainer.checkpoint.load.Reader`), or what is made of one."""

    @property
    def shapes(self) -> Mapping[tuple[str, str], tuple[int, ...]]:
        """Of each parameter, by its name and "master"."""

    def read_into(self, parameter: str, state: str, start: int, target: torch.Tensor) -> None:
        """Fill the flat `target` with elements [start, start + numel) of a parameter; state: "master"."""


def write_weights(reader: Source, form: Format, folder: Path, dtype: torch.dtype, max_bytes: int) -> list[Path]:
    """The files of weights in `folder`, of at most `max_bytes` each (a larger tensor has one for itself).

    Raises CheckpointError where the checkpoint lacks a tensor, or has one that the format does not know.
    """
    _check(reader, form)
    parts = list(_parts(reader, form, dtype.itemsize, max_bytes))
    single = len(parts) == 1
    names = [
        "model.safetensors" if single else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        for number in range(1, len(parts) + 1)
    ]
    constants = {theirs: value().to(dtype) for theirs, value in form.constants.items()}
    for name, part in zip(names, parts, strict=True):
        tensors = {one.theirs: _read(reader, one).to(dtype) for one in part}
        if name == names[0]:
            tensors |= constants
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if not single:
        places = {one.theirs: name for name, part in zip(names, parts, strict=True) for one in part}
        places |= dict.fromkeys(constants, names[0])
        numel = sum(_numel(reader, one) for one in form.tensors) + sum(map(torch.numel, constants.values()))
        total = numel * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return [folder / name for name in names]


def _check(reader: Source, form: Format) -> None:
    there = {parameter for parameter, state in reader.shapes if state == "master"}
    wanted = {one.ours for one in form.tensors}
    if there != wanted:
        lost = [f"the checkpoint lacks {name}" for name in sorted(wanted - there)]
        lost += [f"{form.architecture} has no place for {name}" for name in sorted(there - wanted)]
        raise CheckpointError(f"The checkpoint is not of this model: {'; '.join(lost[:5])}.")


def _parts(reader: Source, form: Format, item_size: int, max_bytes: int) -> Iterator[list[Tensor]]:
    """The tensors of each file."""
    part: list[Tensor] = []
    size = 0
    for one in form.tensors:
        num_bytes = _numel(reader, one) * item_size
        if part and size + num_bytes > max_bytes:
            yield part
            part, size = [], 0
        part.append(one)
        size += num_bytes
    yield part


def _shape(reader: Source, one: Tensor) -> torch.Size:
    rows, *rest = reader.shapes[one.ours, "master"]
    return torch.Size((min(rows, one.end or rows) - one.begin, *rest))


def _numel(reader: Source, one: Tensor) -> int:
    rows, *rest = _shape(reader, one)
    return torch.Size((one.skip + rows, *rest)).numel()


def _read(reader: Source, one: Tensor) -> torch.Tensor:
    shape = _shape(reader, one)
    row = shape[1:].numel()
    values = torch.zeros(_numel(reader, one))
    reader.read_into(one.ours, "master", one.begin * row, values[one.skip * row :])
    values = values.view(one.skip + shape[0], *shape[1:])
    if one.as_row:
        return values[None]
    return values.t().contiguous() if one.transposed else values
