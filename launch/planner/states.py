"""Model states beside the tables of the ZeRO paper and DeepSpeed's estimator, which count nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from launch.planner.published import MODELS, SYSTEMS
from trainer.estimate.cluster import load_cluster
from trainer.estimate.layout import OURS, Layout
from trainer.estimate.predict import predict
from trainer.estimate.shape import Shape

PAPER = replace(OURS, name="as the paper counts", gradient=2.0)
STATES = ("parameters", "masters", "gradients", "optimizer states")

TABLE_1 = {
    (7.5, 1): (120, 120, 120), (7.5, 4): (52.5, 41.3, 30), (7.5, 16): (35.6, 21.6, 7.5), (7.5, 64): (31.4, 16.6, 1.88),
    (7.5, 256): (30.4, 15.4, 0.47), (7.5, 1024): (30.1, 15.1, 0.12), (128, 1): (2048, 2048, 2048),
    (128, 4): (896, 704, 512), (128, 16): (608, 368, 128), (128, 64): (536, 284, 32), (128, 256): (518, 263, 8),
    (128, 1024): (513, 257, 2), (1000, 1): (16000, 16000, 16000), (1000, 4): (7000, 5500, 4000),
    (1000, 16): (4750, 2875, 1000), (1000, 64): (4187, 2218, 250), (1000, 256): (4046, 2054, 62.5),
    (1000, 1024): (4011, 2013, 15.6),
}  # fmt: skip
"""(billions of parameters, data parallel ranks): GB of a rank in stages 1, 2, 3 (Rajbhandari et al. 2020, table 1)."""

TABLE_2 = {1: (2, 7.6, 14.4, 128), 2: (4, 15.2, 28.8, 256), 4: (8, 30.4, 57.6, 512), 8: (16, 60.8, 115.2, 1000),
           16: (32, 121.6, 230.4, 2000)}  # fmt: skip
"""Model parallel ranks: billions of parameters that 32 GB a device hold with 64 data parallel ranks, without ZeRO and
in stages 1, 2, 3 (table 2, "max theoretical"; its last two numbers of stage 3 are rounded)."""

MEASURED_LLAMA = (14678, 21272)
"""MiB on a device after deepspeed.initialize, and after the second forward pass: LLaMA-7B, 4 devices, ZeRO-3 with both
offloads, which DeepSpeed's estimator puts at 0.49 GB (deepspeedai/DeepSpeed issue 4527; its batch is not told)."""


def bytes_of_states(shape: Shape, layout: Layout) -> float:
    """Of a rank, on the device."""
    made = predict(shape, layout, load_cluster("v100_32gb"))
    return sum(term.value for term in made.memory if term.name in STATES)


def compared() -> Iterator[tuple[str, float, float]]:
    """(what, published, predicted): GB of table 1, billions of parameters of table 2."""
    for (billions, ranks), published in TABLE_1.items():
        for stage, value in zip((1, 2, 3), published, strict=True):
            layout = Layout(ranks=ranks, zero_stage=stage, system=PAPER)
            found = bytes_of_states(Shape(extra=int(billions * 1e9)), layout) / 1e9
            yield f"table 1: GB, {billions:g} B parameters, {ranks} ranks, stage {stage}", value, found
    for model_parallel, largest in TABLE_2.items():
        for stage, value in zip((0, 1, 2, 3), largest, strict=True):
            each = bytes_of_states(Shape(extra=10**9), Layout(ranks=64, zero_stage=stage, system=PAPER)) / 1e9
            what = f"table 2: billions that fit 32 GB, {model_parallel} x 64 ranks, stage {stage}"
            yield what, value, 32 / each * model_parallel


def llama_with_offload(length: int) -> float:
    """GiB on the device of what `MEASURED_LLAMA` is of, for one sample of this length and plain attention."""
    system = replace(SYSTEMS["torchtitan"], held=2.0, master=4.0, live_elements=1e9, bucket_elements=5e8,
                     attention="unfused", head_loss="eager")  # fmt: skip
    layout = Layout(ranks=4, zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu", target_length=length,
                    precision="fp16", system=system)  # fmt: skip
    return predict(MODELS["llama2-7b"], layout, load_cluster("a100_80gb")).device_bytes.value / 2**30


def table() -> str:
    """In Markdown."""
    lines = ["## ZeRO (Rajbhandari et al. 2020), tables 1 and 2", "", "| what | published | predicted | error |"]
    lines.append("|---|---|---|---|")
    for what, published, predicted in compared():
        lines.append(f"| {what} | {published:g} | {predicted:.4g} | {predicted / published - 1:+.1%} |")
    low, high = (mib / 1024 for mib in MEASURED_LLAMA)
    lengths = ", ".join(f"{llama_with_offload(length):.1f} GiB of {length} tokens" for length in (512, 1024, 2048))
    lines += [
        "",
        "## DeepSpeed's estimator",
        "",
        f"LLaMA-7B on 4 devices, ZeRO-3, both offloads (deepspeedai/DeepSpeed issue 4527): estimated 0.49 GB, measured"
        f" {low:.1f} to {high:.1f} GiB. Its batch is not told; predicted for one sample: {lengths}.",
        "",
    ]
    return "\n".join(lines)
