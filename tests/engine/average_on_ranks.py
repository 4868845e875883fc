"""Run by every rank of `test_average.py`: what ZeRO engines hold after some steps, against plain engines."""

from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace

import torch

from trainer import distributed
from trainer.composition import compose
from trainer.config import to_config
from trainer.engine import ds_config
from trainer.initial import initialise
from trainer.models.decoder import Decoder
from trainer.parallel.layout import make_layout
from trainer.parts import make_engine
from trainer.plan import make_plan
from trainer.tasks.loss import token_loss

TOKENS = 3 * 2 * 8
ds_config.SMALLEST_BUCKET = 64  # so that these small models, too, send in pieces, and tables by themselves


def learnt(words):
    """Losses of three steps and one of the evaluated average; then all states, gathered from the ranks."""
    build_model = partial(Decoder, 60, d_model=32, num_heads=2, d_ff=48, num_layers=1)
    words = ["experiment=lm_small", "precision=fp32", "ema.decay=0.6", "ema.evaluate=true", *words]
    config = to_config(compose([*words, f"batch.global_size={distributed.world_size()}"]))
    engine = make_engine(config, make_plan(config, distributed.world_size()), build_model, make_layout(1, 1))
    initialise(engine, build_model, seed=0)
    task = SimpleNamespace(loss=partial(token_loss, label_smoothing=0.1, z_loss=1e-3))
    losses = []
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + distributed.rank())
        for last in (False, True):
            ids = torch.randint(60, (3, 9), generator=generator)
            batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
            sums = engine.forward_backward(task, batch, 1 / TOKENS / distributed.world_size(), last)
            losses.append(float(sums.nll))
        engine.step(1e-3)
    with engine.evaluating():
        losses.append(float(task.loss(engine.model, batch).nll))
    states = {}
    for part in distributed.all_gather_objects([(f.parameter, f.key, f.start, f.tensor) for f in engine.fragments()]):
        for parameter, key, start, values in part:
            states[parameter, key, start] = values
    whole = {}
    for (parameter, key, _), values in sorted(states.items(), key=lambda item: item[0]):
        whole[parameter, key] = torch.cat([whole.get((parameter, key), torch.empty(0)), values.flatten()])
    return losses, whole


with distributed.process_group(True):
    for case in sys.argv[1:]:
        engine, optimizer, *words = case.split(",")
        expected, plain = learnt([f"optimizer={optimizer}"])
        losses, states = learnt([f"engine={engine}", f"optimizer={optimizer}", *words])
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
        assert states.keys() == plain.keys(), (states.keys(), plain.keys())
        for name, values in plain.items():
            if name[1] in ("master", "ema"):
                torch.testing.assert_close(states[name][: len(values)], values, rtol=1e-4, atol=1e-5, msg=str(name))
        distributed.barrier()
        if distributed.rank() == 0:
            print(f"{case} is the same: {losses[-1]}", flush=True)
