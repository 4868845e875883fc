"""Write a shard without a copy of it: one piece after the other, from wherever the engine holds it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch


def write_pieces(
    path: Path, sizes: Mapping[str, int], pieces: Iterable[tuple[str, torch.Tensor]], metadata: Mapping[str, str]
) -> None:
    """A safetensors file of flat fp32 tensors, no more than one of which is copied to host memory at once.

    sizes: elements by key, in the order in which `pieces` gives (key, tensor). Raises OSError.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for key, numel in sizes.items():
        header[key] = {"dtype": "F32", "shape": [numel], "data_offsets": [end, end + 4 * numel]}
        end += 4 * numel
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (key, tensor), expected in zip(pieces, sizes, strict=True):
            assert key == expected and tensor.dtype == torch.float32, f"{key} ({tensor.dtype}) instead of {expected}"
            file.write(tensor.detach().cpu().contiguous().numpy().data)
