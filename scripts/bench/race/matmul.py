"""Not an entrant but the measure of the lap "peak": products of bf16 matrices and nothing else, as fast as this machine
makes them. A step is four products [2048, 2048] x [2048, 2048]; its "target_tokens" are floating point operations."""

from __future__ import annotations

import os

import torch
from common import Events, read_spec

SIZE, PRODUCTS = 2048, 4


def main() -> None:
    """Multiply until ended."""
    spec = read_spec()
    events = Events(spec["out"])
    events.write("start", pid=os.getpid())
    torch.set_num_threads(spec["threads"])
    left, right = (torch.randn(SIZE, SIZE).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    events.write("ready")
    for step in range(1, spec["steps"] + 1):
        for _ in range(PRODUCTS):
            torch.mm(left, right, out=out)
        events.write("step", step=step, target_tokens=PRODUCTS * 2 * SIZE**3)


if __name__ == "__main__":
    main()
