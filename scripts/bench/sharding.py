"""What a rank holds and sends under each engine, counted from the engine's tensors and the job's collectives, against
the formulas of ZeRO (Rajbhandari et al. 2020, sections 5 and 7).

    python scripts/bench/sharding.py [--engines plain,zero1,zero2,zero3] [--ranks 1,2,4,8] [--release] [--json]
    python scripts/bench/sharding.py --host --engines zero3 --ranks 2,4 --layers 16
    python scripts/bench/sharding.py --largest --engines zero3 --ranks 1

With P parameters on N ranks in bf16: plain 16 P bytes, ZeRO-1 4 P + 12 P / N, ZeRO-2 2 P + 14 P / N, ZeRO-3 16 P / N;
sent a step, in elements: 2 P, and 3 P for ZeRO-3. An all-reduce of M bytes counts 2 M, reduce-scatter, reduce and
all-gather M. "ratio" is measured / formula; "after" is the same once fp32 sums of gradients, where the paper has bf16,
and all-reduces, where it has reduce-scatters, are counted its way. Buffers of constant size are named, not added.
--release: ZeRO-3 gives parameters back after each use, as it does by itself from 10^9 parameters on. --host: peak
resident memory while a model is built, saved and loaded, above what imports take, as a multiple of the rank's
parameters, masters, optimizer states and sums of gradients (18 P / N bytes). --largest: layers are doubled while a step
fits in 8 GB of resident memory a rank. Ranks are gloo processes with one thread each; the largest figure of any rank
is told.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from launch.planner.count import hanging_on

ROOT = Path(__file__).resolve().parents[2]
LIMIT_BYTES = 8 * 10**9
WORDS = (
    "experiment=lm_small", "logging=[]", "precision=bf16", "name=bench", "optimizer=adamw", "model.d_model=512",
    "model.num_heads=8", "model.num_kv_heads=8", "model.d_ff=1376", "model.vocab_size=8192", "batch.micro_tokens=null",
    "batch.micro_size=1", "checkpoint.every=1",
)  # fmt: skip
GRADIENT_NAMES = ("grad", "_sum_flat")
_SENT = dict.fromkeys(("allreduce", "allreduce_coalesced"), 2) | dict.fromkeys(
    (
        *("reduce", "broadcast", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced"),
        *("_reduce_scatter_base", "reduce_scatter_tensor_coalesced"),
        *("allgather", "allgather_coalesced", "all_gather_single", "all_gather_single_coalesced"),
        *("_allgather_base", "allgather_into_tensor_coalesced", "alltoall", "alltoall_base", "all_to_all_single"),
    ),
    1,
)
"""Collectives of a process group, and how often the whole tensor passes a rank."""


class RandomText:
    """A task that needs no data: cross-entropy on random ids."""

    def loss(self, model: Any, batch: Mapping[str, torch.Tensor]) -> Any:
        from trainer.tasks import LossSums

        logits = model(batch).float()
        total = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
        count = torch.tensor(1)
        return LossSums(total, total.detach(), count, count)


def storage_of(tensor: torch.Tensor) -> tuple[int, int]:
    """(address, bytes) of what a tensor is a view of."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def named_tensors(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that hang on an object, with the last attribute's name, and their gradients."""
    for attribute, tensor in hanging_on(value, name):
        yield attribute, tensor
        if tensor.grad is not None:
            yield "grad", tensor.grad


def held(engine: Any) -> dict[str, Any]:
    """Bytes of this rank between backward and update, by kind; `gradients` and `buffers` by the names they hang on."""
    shards = {storage_of(getattr(p, "ds_tensor", p)) for p in engine.module.parameters()}
    kept_whole = {storage_of(p) for p in engine.module.parameters() if hasattr(p, "ds_tensor")} - shards
    states = {storage_of(fragment.tensor) for fragment in engine.fragments()} - shards
    owners = {"engine": engine, "optimizer": getattr(engine, "_optimizer", None)}
    owners["parameters"] = list(engine.module.parameters())
    rest: dict[tuple[int, int], str] = {}
    for name, tensor in (pair for owner, value in owners.items() for pair in named_tensors(value, owner)):
        if tensor.is_floating_point() and tensor.device.type != "meta":
            rest.setdefault(storage_of(tensor), f"{name} {str(tensor.dtype).removeprefix('torch.')}")
    others = {found: name for found, name in rest.items() if found not in shards | states | kept_whole}
    kinds: dict[str, dict[str, int]] = {"gradients": defaultdict(int), "buffers": defaultdict(int)}
    for (_, num_bytes), name in others.items():
        kind = "gradients" if any(word in name for word in GRADIENT_NAMES) else "buffers"
        kinds[kind][name] += num_bytes
    size = partial(sum, start=0)
    return {
        "parameters": size(b for _, b in shards), "kept whole": size(b for _, b in kept_whole),
        "states": size(b for _, b in states), **{kind: dict(names) for kind, names in kinds.items()},
    }  # fmt: skip


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a collective's argument, however nested."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


@contextmanager
def counting(world_size: int) -> Iterator[dict[str, int]]:
    """Inside, what every collective sends is added up as "COLLECTIVE DTYPE" -> bytes; below 1 KB it is not."""
    sent: dict[str, int] = defaultdict(int)
    group = torch.distributed.ProcessGroup
    originals = {name: vars(group)[name] for name in _SENT if name in vars(group)}

    def counted(name: str, original: Any) -> Any:
        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            operands = [list(tensors_in(part)) for part in arguments[:2]]
            whole = max(operands, key=lambda tensors: sum(t.nbytes for t in tensors), default=[])
            num_bytes = sum(tensor.nbytes for tensor in whole)
            if num_bytes >= 1024 and world_size > 1:
                sent[f"{name.strip('_')} {str(whole[0].dtype).removeprefix('torch.')}"] += _SENT[name] * num_bytes
            return original(self, *arguments, **options)

        return call

    for name in originals:
        setattr(group, name, counted(name, getattr(group, name)))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(group, name, original)


def resident_bytes(what: str) -> int:
    """VmRSS (now), VmHWM (peak) or RssFile (of mapped files) of this process."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def forget_peak() -> None:
    """VmHWM begins anew at VmRSS."""
    Path("/proc/self/clear_refs").write_text("5")


def prepared(words: list[str], folder: str) -> tuple[Any, Any, Any]:
    """Configuration, plan and what builds the model."""
    from trainer import distributed
    from trainer.build import build
    from trainer.composition import compose
    from trainer.config import to_config
    from trainer.plan import make_plan

    ranks = distributed.world_size()
    config = to_config(compose([*WORDS, f"batch.global_size={ranks}", f"runs_dir={folder}", *words]))
    return config, make_plan(config, ranks), partial(build, config.model, "model")


def step(engine: Any, rank: int) -> None:
    """Forward and backward of 32 random tokens."""
    batch = {"input_ids": torch.randint(8192, (1, 32), generator=torch.Generator().manual_seed(rank))}
    engine.forward_backward(RandomText(), batch, 1.0, last=True)


def run_child(options: argparse.Namespace) -> None:
    """One rank: measure as asked, and let rank 0 print the largest figures as JSON."""
    torch.set_num_threads(1)
    from trainer import distributed
    from trainer.initial import initialise
    from trainer.parallel.layout import make_layout
    from trainer.parts import make_engine

    with distributed.process_group(True), tempfile.TemporaryDirectory() as own_folder:
        folder = distributed.broadcast_object(own_folder)
        config, plan, build_model = prepared(options.words, folder)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in build_model().parameters())
        if options.host:  # what is imported only when an engine is built belongs to the baseline too
            small = ["model.num_layers=1", "model.d_model=64", "model.d_ff=64", "model.vocab_size=64"]
            _, small_plan, build_small = prepared([*options.words, *small], folder)
            initialise(make_engine(config, small_plan, build_small, make_layout(1, 1)), build_small, seed=0)
        gc.collect()
        baseline = resident_bytes("VmRSS")
        build_engine = partial(make_engine, config, plan, build_model, make_layout(1, 1))
        if options.release:
            release_parameters()
        found: dict[str, Any] = {"numel": parameters}
        if options.host:
            found |= host_memory(build_engine, build_model, Path(folder), baseline, parameters / plan.world_size)
        else:
            found |= shards_and_traffic(build_engine, build_model, plan.world_size)
        found["peak"] = resident_bytes("VmHWM")
        everyone = distributed.all_gather_objects(found)
        if distributed.rank() == 0:
            largest = max(everyone, key=lambda one: one["peak"] if options.host or options.largest else 0)
            print(f"RESULT {json.dumps(largest)}", flush=True)
        distributed.barrier()


def release_parameters() -> None:
    """Let ZeRO-3 give parameters back after each use, as it does by itself from 10^9 parameters on."""
    from trainer import parts

    usual = parts.make_ds_config

    def releasing(plan: Any) -> dict[str, Any]:
        settings = usual(plan)
        settings["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
        return settings

    parts.make_ds_config = releasing


def shards_and_traffic(build_engine: Any, build_model: Any, world_size: int) -> dict[str, Any]:
    """What `held` and `counting` find in the second step."""
    from trainer import distributed
    from trainer.initial import initialise

    engine = build_engine()
    initialise(engine, build_model, seed=0)
    step(engine, distributed.rank())
    engine.step(1e-4)
    peak_of_bf16 = 0

    def look(_: torch.Tensor) -> None:
        nonlocal peak_of_bf16
        alive = [p.grad.nbytes for p in engine.module.parameters() if p.grad is not None]
        peak_of_bf16 = max(peak_of_bf16, sum(alive))

    for parameter in engine.module.parameters():
        parameter.register_post_accumulate_grad_hook(look)
    with counting(world_size) as sent:
        step(engine, distributed.rank())
        found = held(engine)
        engine.step(1e-4)
    return {**found, "sent": dict(sent), "bf16 gradients at the peak": peak_of_bf16}


def host_memory(build_engine: Any, build_model: Any, folder: Path, baseline: int, share: float) -> dict[str, Any]:
    """Peak resident bytes above `baseline` of building, saving, loading, and of a step without and with a save in the
    background; `share`: parameters of a rank."""
    from trainer import distributed
    from trainer.checkpoint.load import load, newest
    from trainer.checkpoint.save import Checkpointer
    from trainer.config import CheckpointConfig
    from trainer.host import keep_freed_memory, return_freed_memory
    from trainer.initial import initialise
    from trainer.state import TrainState

    keep_freed_memory()
    peaks: dict[str, int] = {}

    def note(phase: str) -> None:
        peaks[phase] = resident_bytes("VmHWM") - baseline
        return_freed_memory()
        forget_peak()

    def checkpointer(asynchronous: bool) -> Checkpointer:
        return Checkpointer(folder, engine, {}, CheckpointConfig(keep=1, asynchronous=asynchronous), lambda *_: None)

    def train(saving: Checkpointer | None = None) -> None:
        if saving is not None:
            saving.save(TrainState(step=2), {})
        step(engine, distributed.rank())
        if saving is not None:
            saving.settle()
        engine.step(1e-4)
        if saving is not None:
            saving.require()

    forget_peak()
    engine = build_engine()
    return_freed_memory()
    initialise(engine, build_model, seed=0)
    note("build")
    blocking = checkpointer(asynchronous=False)
    blocking.save(TrainState(step=1), {})
    blocking.require()
    note("save")
    checkpoint = newest(folder)
    assert checkpoint is not None
    load(checkpoint, engine)
    note("load")
    train()
    note("step")
    train(checkpointer(asynchronous=True))
    note("step with a save in the background")
    return {"peaks": peaks, "needed": 18 * share}


def measure(engine: str, ranks: int, options: argparse.Namespace, words: list[str]) -> dict[str, Any] | None:
    """Start the ranks; what the child found, or None where it ran out of memory or failed."""
    mode = [f"--{name}" for name in ("host", "largest", "release") if getattr(options, name)]
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone", __file__, "--child",
        *mode, f"--engines={engine}", "--", f"engine={engine}", *words,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        print(done.stderr[-2000:], file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    return {"engine": engine, "ranks": ranks, **found}


def formulas(engine: str, parameters: int, ranks: int) -> tuple[float, float]:
    """Bytes held and bytes sent a step, by the paper."""
    sizes = {
        "plain": 16.0, "zero1": 4 + 12 / ranks, "zero2": 2 + 14 / ranks, "zero3": 16 / ranks,
    }  # fmt: skip
    sent = 0 if ranks == 1 else 2 * (3 if engine == "zero3" else 2)
    return sizes[engine] * parameters, sent * float(parameters)


def compare(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with totals, the paper's bytes, and two ratios: as measured, and after what our engines do otherwise by
    name is taken away: gradients summed in fp32, and all-reduces where a reduce-scatter would do."""
    formula, sent_formula = formulas(row["engine"], row["numel"], row["ranks"])
    gradients, sent = sum(row["gradients"].values()), row["sent"]
    in_bf16 = sum(num_bytes for name, num_bytes in row["gradients"].items() if name.endswith("bfloat16"))
    counted = max(in_bf16, (gradients - in_bf16) / 2)
    total = row["parameters"] + gradients + row["states"]
    twice = {"float32": 2, "bfloat16": 1}
    sent_counted = sum(
        num_bytes / twice.get(name.split()[1], 1) / (2 if "allreduce" in name and row["engine"] != "plain" else 1)
        for name, num_bytes in sent.items()
    )
    return {
        **row, "total": total, "formula": formula, "ratio": total / formula,
        "ratio after": (total - gradients + counted) / formula,
        "sent bytes": sum(sent.values()), "sent formula": sent_formula,
        "sent ratio": sum(sent.values()) / sent_formula if sent_formula else None,
        "sent ratio after": sent_counted / sent_formula if sent_formula else None,
    }  # fmt: skip


def show(row: dict[str, Any]) -> None:
    """One line of the table, and one of the names behind it; bytes in MB."""

    def mega(value: float) -> str:
        return f"{value / 1e6:8.1f}"

    def ratio(name: str) -> str:
        return "   -  " if row[name] is None else f"{row[name]:6.3f}"

    held_bytes = (row["parameters"], sum(row["gradients"].values()), row["states"], row["total"], row["formula"])
    print(
        f"{row['engine']:<6} {row['ranks']:>2}", *map(mega, held_bytes), ratio("ratio"), ratio("ratio after"), " |",
        mega(row["sent bytes"]), mega(row["sent formula"]), ratio("sent ratio"), ratio("sent ratio after"),
    )  # fmt: skip
    named = {**row["gradients"], **row["buffers"], **row["sent"]}
    named |= {"kept whole": row["kept whole"], "bf16 gradients at the peak": row["bf16 gradients at the peak"]}
    print("      ", ", ".join(f"{name} {num_bytes / 1e6:.1f}" for name, num_bytes in named.items() if num_bytes > 5e4))
    sys.stdout.flush()


def find_largest(engine: str, ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """The most layers, of those that doubling reaches, whose step stays below `LIMIT_BYTES` a rank; and the largest
    model by formula."""
    fitting: dict[str, Any] = {}
    layers = options.layers
    while (row := measure(engine, ranks, options, [f"model.num_layers={layers}"])) is not None:
        if row["peak"] > LIMIT_BYTES:
            break
        fitting = {"layers": layers, "numel": row["numel"], "peak": row["peak"]}
        layers *= 2
    held_bytes, _ = formulas(engine, 1, ranks)
    return {"engine": engine, "ranks": ranks, **fitting, "planned numel": round(LIMIT_BYTES / held_bytes)}


def main() -> None:
    """Start every combination asked for, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=lambda text: text.split(","), default=["plain", "zero1", "zero2", "zero3"])
    parser.add_argument("--ranks", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 4, 8])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--largest", action="store_true")
    parser.add_argument("--release", action="store_true", help="let ZeRO-3 give parameters back after each use")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help="overrides, key=value")
    options = parser.parse_args()
    if options.child:
        run_child(options)
        return
    words = [f"model.num_layers={options.layers}", *options.words]
    if not (options.json or options.host or options.largest):
        print("MB ranks   params    grads   states    total  formula  ratio  after |     sent  formula  ratio  after")
    for engine in options.engines:
        for ranks in options.ranks:
            if options.largest:
                print(json.dumps(find_largest(engine, ranks, options)), flush=True)
                continue
            row = measure(engine, ranks, options, words)
            if row is None:
                continue
            if not options.host:
                row = compare(row)
            if options.json:
                print(json.dumps(row), flush=True)
            elif options.host:
                told = ", ".join(f"{what} {peak / row['needed']:.2f}" for what, peak in row["peaks"].items())
                print(f"{engine} {ranks}: {row['numel']:,} parameters, {row['needed'] / 1e6:.0f} MB a rank; {told}")
            else:
                show(row)


if __name__ == "__main__":
    main()
