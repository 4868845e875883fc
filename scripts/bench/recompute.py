"""What recomputing saves and costs: peak bytes of all tensors over forward and backward, and processor time.

    python scripts/bench/recompute.py [--layers 6] [--d-model 256] [--samples 8] [--length 256] [--pairs 3]

A decoder and an encoder-decoder in fp32 with dropout, on one process; `none`, `selective` and `full` take turns.
Printed: the peak without the parameters, and the processor time of a step on one thread, each beside that of `none`
(medians).
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.config import ActivationOffload, Recompute
from trainer.engine.recompute import lighten
from trainer.models.decoder import Decoder
from trainer.models.encoder_decoder import EncoderDecoder

VOCABULARY = 1000


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and that still exist, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        made = operation(*arguments, **(options or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return made

    def _gone(self, storage: int, num_bytes: int) -> None:
        self.now -= num_bytes
        self.seen.discard(storage)


def learn(model: Any, batch: Any) -> None:
    """Forward and backward."""
    model(batch).float().square().mean().backward()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 6), ("d-model", 256), ("samples", 8), ("length", 256), ("pairs", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"d_model": options.d_model, "d_ff": 4 * options.d_model, "num_heads": 4, "dropout": 0.1}
    ids = torch.randint(VOCABULARY, (options.samples, options.length))
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = {"input_ids": ids, "source_ids": ids, "source_mask": mask, "decoder_input_ids": ids}
    half = options.layers // 2
    for kind, layers in (
        (Decoder, {"num_layers": options.layers}),
        (EncoderDecoder, {"encoder_layers": half, "decoder_layers": half}),
    ):
        peaks: dict[str, int] = {}
        seconds: dict[str, list[float]] = {}
        models = {one: lighten(kind(VOCABULARY, **sizes, **layers), one, ActivationOffload.none) for one in Recompute}
        for model in models.values():
            model.reset_parameters(torch.Generator().manual_seed(0))  # type: ignore[operator]
        for _ in range(options.pairs + 1):
            for recompute, model in models.items():
                model.zero_grad(set_to_none=True)
                started = time.process_time()
                learn(model, batch)
                seconds.setdefault(recompute, []).append(time.process_time() - started)
        for recompute, model in models.items():
            model.zero_grad(set_to_none=True)
            with LiveBytes() as live:
                learn(model, batch)
            peaks[recompute] = live.peak
        for recompute in models:
            took, usual = statistics.median(seconds[recompute][1:]), statistics.median(seconds[Recompute.none][1:])
            print(
                f"{kind.__name__:<14} {recompute:<10} peak {peaks[recompute] / 1e6:7.1f} MB"
                f" ({peaks[recompute] / peaks[Recompute.none]:.2f}), step {took:.2f} s ({took / usual:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
