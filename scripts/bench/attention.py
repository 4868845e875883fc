"""Plain attention products against PyTorch's fused CPU kernel, forward and backward, by precision and length.

    python scripts/bench/attention.py [--threads 2]

Each line holds 1,024 or more positions of 4 heads of 64 numbers, causal; the ratio is fused seconds / plain seconds,
medians of interleaved pairs: above 1 the plain products are faster.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.models.attention import causal_bias

SCALE = 64**-0.5


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's kernel."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two products and a softmax."""
    scores = torch.matmul(q * SCALE, k.transpose(-1, -2)) + causal_bias(q.shape[2], q.dtype, q.device)
    return torch.matmul(scores.softmax(dim=-1), v)


def seconds(function: object, qkv: Tensor) -> float:
    """One forward and backward pass."""
    start = time.perf_counter()
    q, k, v = (x.transpose(1, 2) for x in torch.split(qkv, [4, 4, 4], dim=2))
    out: Tensor = function(q, k, v)  # type: ignore[operator]
    out.transpose(1, 2).sum().backward()
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("precision  batch x length   fused / plain")
    for dtype in (torch.float32, torch.bfloat16):
        for length in (32, 64, 128, 256, 512, 1024):
            qkv = torch.randn(1024 // length, length, 12, 64, dtype=dtype, requires_grad=True)
            pairs = [(seconds(fused, qkv), seconds(plain, qkv)) for _ in range(options.pairs + 2)][2:]
            ratio = statistics.median(slow / fast for slow, fast in pairs)
            print(f"{str(dtype)[6:]:9}  {len(qkv):5} x {length:4}   {ratio:10.2f}", flush=True)


if __name__ == "__main__":
    main()
