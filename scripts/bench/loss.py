"""The output head and its loss, fused in chunks, against whole logits: seconds and peak memory of forward and backward.

    OMP_NUM_THREADS=2 python scripts/bench/loss.py [--tokens 8192] [--vocabulary 131072] [--d-model 256] [--pairs 3]

`plain` is F.linear and F.cross_entropy under autograd, `whole` F.linear and our loss of whole logits, `fused` the
head's own loss. They take turns; printed are the medians of the seconds and of their ratio to the plain one beside it,
by the clock and by the processor's time (which tells more on a busy machine, with one thread), and the peak bytes of
all tensors above hidden states, weight and their gradients. Equality of loss and gradients is checked first, relative
to the largest element.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from recompute import LiveBytes
from torch import Tensor

from trainer.cross_entropy import Targets
from trainer.tasks import IGNORE
from trainer.tasks.loss import cross_entropy_sums

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """PyTorch's own."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE, label_smoothing=smoothing)


def whole(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Our loss of logits."""
    return cross_entropy_sums(F.linear(hidden, weight), labels, smoothing).objective


def fused(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Our loss of hidden states."""
    return Targets(labels, smoothing)(hidden, weight, None)[0]


def learn(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float) -> tuple[float, float, Tensor]:
    """Forward and backward: seconds, those of the processor, and the loss."""
    hidden.grad = weight.grad = None
    started, busy = time.perf_counter(), time.process_time()
    value = loss(hidden, weight, labels, smoothing) / len(labels)
    value.backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - started, time.process_time() - busy, value.detach()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 8192), ("vocabulary", 131072), ("d-model", 256), ("pairs", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--smoothing", type=float, default=0.0)
    parser.add_argument("--padding", type=float, default=0.0, help="share of positions without a label")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    hidden = torch.randn(options.tokens, options.d_model, dtype=dtype).requires_grad_()
    weight = torch.randn(options.vocabulary, options.d_model, dtype=dtype).mul_(options.d_model**-0.5).requires_grad_()
    labels = torch.randint(options.vocabulary, (options.tokens,))
    labels[torch.rand(options.tokens) < options.padding] = IGNORE
    case = hidden, weight, labels, options.smoothing
    losses: dict[str, Loss] = {"plain": plain, "whole": whole, "fused": fused}
    peaks, made = {}, {}
    for name, loss in losses.items():
        with LiveBytes() as live:
            live.seen |= {tensor.untyped_storage()._cdata for tensor in (hidden, weight)}
            value = learn(loss, *case)[2]
        kept = sum(tensor.numel() * tensor.itemsize for tensor in (hidden, weight))
        peaks[name] = live.peak - kept
        made[name] = value, hidden.grad, weight.grad
    for name in ("whole", "fused"):
        off = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(made[name], made["plain"], strict=True)]  # type: ignore[union-attr, operator]
        print(
            f"{name}: loss and gradients differ from the plain ones by " + ", ".join(f"{x:.1e}" for x in off),
            flush=True,
        )
    made.clear()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in losses}
    for _ in range(options.pairs):
        for name, loss in losses.items():
            seconds[name].append(learn(loss, *case)[:2])
    logits_and_gradient = 2 * options.tokens * options.vocabulary * dtype.itemsize
    timed = (0, 1) if options.pairs else ()
    times = "seconds   of plain   processor   of plain   " if timed else ""
    print(f"loss    {times}peak MiB   of logits and gradient")
    for name in losses:
        line = f"{name:6}"
        for kind in timed:
            beside = zip(seconds[name], seconds["plain"], strict=True)
            ratio = statistics.median(own[kind] / other[kind] for own, other in beside)
            line += f" {statistics.median(one[kind] for one in seconds[name]):8.2f} {ratio:10.3f}  "
        print(f"{line} {peaks[name] / 2**20:6.0f} {peaks[name] / logits_and_gradient:24.3f}", flush=True)


if __name__ == "__main__":
    main()
