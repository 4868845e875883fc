"""Run by every rank of `test_recompute.py`: steps of ZeRO engines that keep everything and of those that recompute."""

from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace

import torch

from trainer import distributed
from trainer.composition import compose
from trainer.config import to_config
from trainer.initial import initialise
from trainer.models.encoder_decoder import EncoderDecoder
from trainer.parallel.layout import make_layout
from trainer.parts import make_engine
from trainer.plan import make_plan
from trainer.tasks import LossSums


def loss(model, batch):
    total = model(batch).float().square().sum()
    return LossSums(total, total.detach(), torch.tensor(1), torch.tensor(1))


def losses(engine_name, dropout, *words):
    """Of two micro-batches in each of three steps; biases on, and parameters above the size that ZeRO-3 shards."""
    sizes = {"d_model": 128, "d_ff": 1024, "encoder_layers": 2, "decoder_layers": 2}
    build_model = partial(EncoderDecoder, 500, dropout=dropout, **sizes)
    words = ["experiment=quickstart", "precision=fp32", f"engine={engine_name}", "batch.micro_size=1", *words]
    config = to_config(compose([*words, f"batch.global_size={2 * distributed.world_size()}"]))
    engine = make_engine(config, make_plan(config, distributed.world_size()), build_model, make_layout(1, 1))
    initialise(engine, build_model, seed=0)
    found = []
    for step in range(3):
        torch.manual_seed(10 * step + distributed.rank())
        for last in (False, True):
            ids = torch.randint(500, (4, 16))
            batch = {"source_ids": ids, "source_mask": torch.ones_like(ids).bool(), "decoder_input_ids": ids}
            sums = engine.forward_backward(SimpleNamespace(loss=loss), batch, 1e-3, last)
            found.append(float(sums.nll))
        found.append(engine.step(1e-3))
    return found


with distributed.process_group(True):
    for case in sys.argv[1:]:
        name, recompute, dropout = case.split(":")
        kept = losses(name, float(dropout))
        again = losses(name, float(dropout), f"engine.recompute={recompute}")
        assert kept == again, f"{case}: {kept} {again}"
        if distributed.rank() == 0:
            print(f"{case} is the same: {kept[-1]}", flush=True)
    distributed.barrier()
