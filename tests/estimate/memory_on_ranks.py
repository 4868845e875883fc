"""Run by every rank of `test_memory.py`: what a rank's memory grows to over some steps, and what was predicted."""

from __future__ import annotations

import gc
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from trainer import distributed
from trainer.build import build
from trainer.composition import compose
from trainer.config import to_config
from trainer.estimate import layout_of, load_cluster, predict, sequence_lengths, shape_of
from trainer.host import build_beside_the_heap, keep_freed_memory, return_freed_memory
from trainer.initial import initialise
from trainer.parallel.layout import make_layout
from trainer.parts import make_engine
from trainer.plan import make_plan
from trainer.tasks.loss import token_loss

MODEL = ("model.d_model=256", "model.num_layers=6", "model.num_heads=4", "model.num_kv_heads=4", "model.d_ff=704",
         "model.vocab_size=12000", "tokenizer.vocab_size=12000", "model.tie_embeddings=false")  # fmt: skip
TINY = ("model.d_model=64", "model.num_layers=1", "model.vocab_size=64", "tokenizer.vocab_size=64")


def resident(what):
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def train(words, steps):
    """Steps of one micro-batch of full rows; the configuration."""
    ranks = distributed.world_size()
    build_beside_the_heap()  # here and below as `trainer.main` does
    config = to_config(compose(["experiment=lm_small", *MODEL, *words, f"batch.global_size={8 * ranks}"]))
    build_model = partial(build, config.model, "model")
    engine = make_engine(config, make_plan(config, ranks), build_model, make_layout(1, 1))
    initialise(engine, build_model, seed=0)
    return_freed_memory()
    keep_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    task = SimpleNamespace(loss=token_loss)
    for _ in range(steps):
        ids = torch.randint(config.model["vocab_size"], (8, sequence_lengths(config)[1]))
        engine.forward_backward(task, {"input_ids": ids, "labels": ids}, 1.0, last=True)
        engine.step(1e-4)
    return config


with distributed.process_group(True):
    torch.set_num_threads(1)
    common = ("data.batching=bucketed", "batch.micro_size=8", "task.sequence_length=256", "precision=bf16")
    for engine in sys.argv[1:]:
        train((f"engine={engine}", *common, *TINY), steps=1)
        gc.collect()
        return_freed_memory()
        before = resident("VmRSS")
        config = train((f"engine={engine}", *common), steps=4)
        taken = max(distributed.all_gather_objects(resident("VmHWM") - before))
        ranks = distributed.world_size()
        made = predict(
            shape_of(config), layout_of(config, ranks, sequence_lengths(config)), load_cluster("cpu").with_ranks(ranks)
        )
        expected = sum(term.value for term in made.memory if term.name != "libraries")
        if distributed.rank() == 0:
            print(f"RATIO {engine} {expected / taken:.3f}: {expected / 1e6:.0f} of {taken / 1e6:.0f} MB", flush=True)
        distributed.barrier()
