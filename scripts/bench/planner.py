"""What the planner predicts, what its count under fake tensors finds, and what gloo ranks on this machine take.

    python scripts/bench/planner.py [--engines plain,zero1,zero2,zero3] [--ranks 1,2] [--precisions bf16,fp32] [--json]
    python scripts/bench/planner.py --model encoder_decoder --engines zero2 -- model.d_model=256 batch.micro_size=16

A decoder (36 M parameters) or an encoder-decoder (30 M), or what the words make of it, trains on full rows of random
ids. Measured: peak resident memory of a rank over six steps, as a run has them, above what it held after imports and a
step of a tiny model; and bytes of all collectives in a step, as `scripts/bench/sharding.py` counts them, of which
(n - 1) / n pass a rank. Predicted: `trainer.estimate` for a CPU, all terms but the libraries. Counted:
`launch.planner.count` with device=cpu: tensors alone, without what the C library's heap keeps. The largest figure of
any rank; one thread each.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent))

STEPS = 6
WORDS = ("logging=[]", "name=bench", "data.batching=bucketed", "model.vocab_size=16384", "tokenizer.vocab_size=16384",
         "model.d_model=512", "model.num_heads=8", "model.max_positions=256")  # fmt: skip
MODELS = {
    "decoder": ("experiment=lm_small", *WORDS, "model.num_layers=6", "model.num_kv_heads=8", "model.d_ff=1376",
                "model.tie_embeddings=false", "task.sequence_length=256", "batch.micro_size=8"),
    "encoder_decoder": ("experiment=quickstart", *WORDS, "model.encoder_layers=3", "model.decoder_layers=3",
                        "model.d_ff=2048", "task.max_source_length=192", "task.max_target_length=128",
                        "batch.micro_size=8"),
}  # fmt: skip
TINY = {
    "decoder": ("model.num_layers=1", "model.d_model=64", "model.d_ff=64", "model.vocab_size=64",
                "tokenizer.vocab_size=64", "task.sequence_length=8"),
    "encoder_decoder": ("model.encoder_layers=1", "model.decoder_layers=1", "model.d_model=64", "model.d_ff=64",
                        "model.vocab_size=64", "tokenizer.vocab_size=64", "task.max_source_length=8",
                        "task.max_target_length=8"),
}  # fmt: skip


def prepared(model: str, words: list[str], ranks: int) -> Any:
    """The configuration of a run of one micro-batch a step on so many ranks."""
    from dataclasses import replace

    from trainer.composition import compose
    from trainer.config import to_config

    config = to_config(compose([*MODELS[model], *words, "batch.global_size=840", "batch.micro_tokens=null"]))
    return replace(config, batch=replace(config.batch, global_size=config.batch.micro_size * ranks))


def train(config: Any, steps: int) -> Any:
    """Build the engine of `config` and do `steps` steps; what does one more."""
    import torch

    from trainer import distributed
    from trainer.build import build
    from trainer.estimate import sequence_lengths
    from trainer.host import build_beside_the_heap, keep_freed_memory, return_freed_memory
    from trainer.initial import initialise
    from trainer.parallel.layout import make_layout
    from trainer.parts import make_engine
    from trainer.plan import make_plan
    from trainer.tasks.loss import token_loss

    class Task:
        def loss(self, model: Any, batch: Any) -> Any:
            return token_loss(model, batch)

    build_beside_the_heap()  # here and below as `trainer.main` does
    plan, build_model = make_plan(config, distributed.world_size()), partial(build, config.model, "model")
    engine = make_engine(config, plan, build_model, make_layout(1, 1))
    initialise(engine, build_model, seed=0)
    return_freed_memory()
    keep_freed_memory()
    lengths, vocabulary = sequence_lengths(config), config.model["vocab_size"]
    random = torch.Generator().manual_seed(distributed.rank())

    def step() -> Any:
        source, target = (
            torch.randint(vocabulary, (config.batch.micro_size, length), generator=random) for length in lengths
        )
        batch = {"input_ids": target, "labels": target}
        if lengths[0]:
            mask = torch.ones_like(source, dtype=torch.bool)
            batch = {"source_ids": source, "source_mask": mask, "decoder_input_ids": target, "labels": target}
        engine.forward_backward(Task(), batch, 1.0, last=True)
        engine.step(1e-4)
        return engine

    for _ in range(steps):
        step()
    return step


def run_child(model: str, words: list[str]) -> None:
    """One rank: what six steps take."""
    import torch
    from sharding import counting, forget_peak, resident_bytes

    from trainer import distributed
    from trainer.host import return_freed_memory

    torch.set_num_threads(1)
    with distributed.process_group(True):
        ranks = distributed.world_size()
        train(prepared(model, [*words, *TINY[model]], ranks), steps=1)
        gc.collect()
        return_freed_memory()
        baseline = resident_bytes("VmRSS")
        step = train(prepared(model, words, ranks), steps=0)
        forget_peak()
        for _ in range(STEPS - 1):
            step()
        with counting(ranks) as sent:
            step()
        found = {"memory": resident_bytes("VmHWM") - baseline, "sent": sum(sent.values()) * (ranks - 1) / ranks}
        everyone = distributed.all_gather_objects(found)
        if distributed.rank() == 0:
            print(f"RESULT {json.dumps(max(everyone, key=lambda one: one['memory']))}", flush=True)
        distributed.barrier()


def measured(model: str, ranks: int, words: list[str]) -> dict[str, float]:
    """Start the ranks; what they took."""
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone", __file__, "--child",
        f"--model={model}", "--", *words,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, float] = json.loads(lines[0].removeprefix("RESULT "))
    return found


def row(model: str, engine: str, ranks: int, precision: str, words: list[str]) -> dict[str, Any]:
    """Predicted, counted and measured bytes."""
    from launch.planner.count import count
    from trainer.estimate import layout_of, load_cluster, predict, sequence_lengths, shape_of

    words = [f"engine={engine}", f"precision={precision}", *words]
    config = prepared(model, words, ranks)
    prediction = predict(
        shape_of(config), layout_of(config, ranks, sequence_lengths(config)), load_cluster("cpu").with_ranks(ranks)
    )
    counted, taken = count(config, ranks, "cpu"), measured(model, ranks, words)
    memory = sum(term.value for term in prediction.memory if term.name != "libraries")
    share = (ranks - 1) / ranks
    return {
        "model": model, "engine": engine, "ranks": ranks, "precision": precision,
        "memory": {"predicted": memory, "counted": counted.peak_bytes, "measured": taken["memory"]},
        "sent": {"predicted": sum(term.bytes_sent for term in prediction.step), "counted": counted.sent_bytes * share,
                 "measured": taken["sent"]},
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    """One line, in MB, with ratios to what was measured."""
    cells = [f"{found['engine']:<6} {found['ranks']:>2} {found['precision']}"]
    for what in ("memory", "sent"):
        figures = found[what]
        base = figures["measured"]
        for kind in ("predicted", "counted"):
            ratio = f"{figures[kind] / base:6.3f}" if base else "   -  "
            cells.append(f"{figures[kind] / 1e6:9.1f} {ratio}")
        cells.append(f"{base / 1e6:9.1f} |")
    print(" ".join(cells), flush=True)


def main() -> None:
    """Every combination asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=lambda text: text.split(","), default=["plain", "zero1", "zero2", "zero3"])
    parser.add_argument("--ranks", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2])
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=["bf16", "fp32"])
    parser.add_argument("--model", choices=MODELS, default="decoder")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help="overrides, key=value")
    options = parser.parse_args()
    if options.child:
        run_child(options.model, options.words)
        return
    if not options.json:
        print("MB                  memory predicted     counted  measured | sent predicted     counted  measured |")
    for precision in options.precisions:
        for engine in options.engines:
            for ranks in options.ranks:
                found = row(options.model, engine, ranks, precision, options.words)
                print(json.dumps(found), flush=True) if options.json else show(found)


if __name__ == "__main__":
    main()
