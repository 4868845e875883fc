"""Published measurements of training runs, and the models and systems they are of, as the formulas want them.

launch/planner/published.csv holds a row for each figure, with its source. What a system holds and how its kernels work
is told by its documentation or code (docs/planner.md says where); nothing is set for a single row.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.estimate.cluster import Cluster, load_cluster
from trainer.estimate.layout import Layout, System
from trainer.estimate.shape import Shape

FILE = Path(__file__).with_name("published.csv")


def _mpt(d_model: int, num_heads: int, layers: int) -> Shape:
    return Shape(
        d_model=d_model, num_heads=num_heads, d_ff=4 * d_model, decoder_layers=layers, vocab_size=50368, tied=True,
        bias=True, norms=2, extra=2 * d_model,
    )  # fmt: skip


def _llama(d_model: int, num_heads: int, kv: int, d_ff: int, layers: int, vocab_size: int = 128256) -> Shape:
    return Shape(
        d_model=d_model, num_heads=num_heads, num_kv_heads=kv, d_ff=d_ff, decoder_layers=layers, vocab_size=vocab_size,
        gated=True, rotary=True, extra=d_model,
    )  # fmt: skip


def _gpt(d_model: int, num_heads: int, layers: int) -> Shape:
    return Shape(
        d_model=d_model, num_heads=num_heads, d_ff=4 * d_model, decoder_layers=layers, vocab_size=51200, tied=True,
        bias=True, norms=2, positions=2048, extra=2 * d_model, dropout=0.1, attention_dropout=0.1,
    )  # fmt: skip


MODELS = {
    "mpt-125m": _mpt(768, 12, 12),
    "mpt-350m": _mpt(1024, 16, 24),
    "mpt-760m": _mpt(1536, 12, 24),
    "mpt-1b": _mpt(2048, 16, 24),
    "mpt-3b": _mpt(2560, 20, 32),
    "mpt-7b": _mpt(4096, 32, 32),
    "mpt-13b": _mpt(5120, 40, 40),
    "mpt-30b": _mpt(7168, 56, 48),
    "mpt-70b": _mpt(8192, 64, 80),
    "llama2-7b": _llama(4096, 32, 32, 11008, 32, 32000),
    "llama2-13b": _llama(5120, 40, 40, 13824, 40, 32000),
    "codellama-34b": _llama(8192, 64, 8, 22016, 48, 32000),
    "llama2-70b": _llama(8192, 64, 8, 28672, 80, 32000),
    "llama3-8b": _llama(4096, 32, 8, 14336, 32),
    "kempner-13b": _llama(5120, 40, 8, 17920, 40),
    "llama3-70b": _llama(8192, 64, 8, 28672, 80),
    "kempner-175b": _llama(12288, 96, 8, 39680, 96),
    "llama3-405b": _llama(16384, 128, 8, 53248, 126),
    "gpt-1.2b": _gpt(1920, 15, 24),
    "gpt-2b": _gpt(2304, 18, 30),
    "gpt-4b": _gpt(3072, 24, 36),
    "gpt-8b": _gpt(4096, 32, 42),
    "gpt-1.7b": _gpt(2304, 24, 24),
    "gpt-3.6b": _gpt(3072, 32, 30),
    "gpt-7.5b": _gpt(4096, 32, 36),
    "gpt-18b": _gpt(6144, 48, 40),
    "gpt-22b": _gpt(6144, 64, 48),
    "gpt-39b": _gpt(8192, 64, 48),
    "gpt-76b": _gpt(10240, 80, 60),
    "gpt-145b": _gpt(12288, 96, 80),
    "gpt-175b": _gpt(12288, 96, 96),
    "gpt-310b": _gpt(16384, 128, 96),
    "gpt-530b": _gpt(20480, 128, 105),
    "gpt-1t": _gpt(25600, 160, 128),
    "t5-v1.1-base": Shape(
        d_model=768, num_heads=12, head_dim=64, d_ff=2048, encoder_layers=12, decoder_layers=12, vocab_size=32128,
        gated=True, extra=2 * 768 + 2 * 32 * 12, relative=True,
    ),
}  # fmt: skip

_FSDP = System(
    name="FSDP",
    held=4.0,
    master=0.0,
    live_elements=0.0,
    bucket_elements=0.0,
    early_stop=True,
    head_loss="eager",
    fused_projection=False,
    attention="flash",
    early_hopper=True,
)
_MEGATRON = System(
    name="Megatron-LM", gradient=4.0, arriving=0.0, sent_gradient=4.0, head_loss="eager", attention="unfused",
    compiled=True, selective="attention", splits_vocabulary="logits", overlaps=False, bucket_elements=0.0,
)  # fmt: skip
_TITAN_TP: dict[str, Any] = {"sequence_norms": True, "splits_vocabulary": "logits"}
_TITAN = replace(_FSDP, name="torchtitan", sent_gradient=4.0, selective="half")

SYSTEMS = {
    "composer": replace(_FSDP, name="Composer (LLM-Foundry)", attention="flash1", head_loss="kernel"),
    "composer-flash2": replace(_FSDP, name="Composer with FlashAttention-2", head_loss="kernel"),
    "torchtitan": _TITAN,
    "torchtitan-tp": replace(_TITAN, name="torchtitan with TP", **_TITAN_TP),
    "torchtitan-compile": replace(_TITAN, name="torchtitan, compiled", compiled=True),
    "torchtitan-tp-compile": replace(_TITAN, name="torchtitan with TP, compiled", compiled=True, **_TITAN_TP),
    "torchtitan-2025": replace(
        _TITAN, name="torchtitan of 2025, compiled", compiled=True, head_loss="compiled", early_hopper=False
    ),
    "fms": replace(_FSDP, name="fms-fsdp", compiled=True),
    "kempnerforge": System(
        name="KempnerForge", master=0.0, gradient=2.0, moments=4.0, sent_gradient=4.0, whole_gradients=True,
        reduces_every_micro_batch=False, live_elements=0.0, bucket_elements=0.0, head_loss="compiled", compiled=True,
        early_stop=True, sequence_norms=True, fused_projection=False, splits_vocabulary="tables",
    ),
    "megatron-fp16": replace(_MEGATRON, gradient=2.0, sent_gradient=2.0),
    "megatron": _MEGATRON,
    "megatron-sp": replace(_MEGATRON, name="Megatron-LM, sequence parallel", sequence_norms=True),
    "nanot5": System(
        name="nanoT5", held=4.0, master=0.0, arriving=0.0, head_loss="eager", attention="unfused", bucket_elements=0.0,
        autocast=True,
    ),
    "nanot5-compile": System(
        name="nanoT5, compiled", held=4.0, master=0.0, arriving=0.0, head_loss="compiled", attention="unfused",
        bucket_elements=0.0, compiled=True, autocast=True,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One published figure. unit: "tokens/s/gpu", "s" (of a step), "GiB" (of a device), "fits" (1 or 0)."""

    source: str
    model: str
    shape: Shape
    layout: Layout
    cluster: Cluster
    unit: str
    value: float
    fitted: bool

    @property
    def name(self) -> str:
        """The configuration, for tables."""
        one = self.layout
        parts = [("TP", one.tensor), ("PP", one.pipeline), ("CP", one.context)]
        split = "".join(f" {name}{ranks}" for name, ranks in parts if ranks > 1)
        again = {"none": "", "selective": " selective", "full": " full"}[one.recompute]
        again += f" 1/{one.recompute_every}" if one.recompute_every > 1 else ""
        shape = f"{one.source_length}+" if one.source_length else ""
        length = f"{shape}{one.target_length} x {one.micro_size:g} x {one.accumulation:g}"
        fp8 = " fp8" if one.system.fp8 else ""
        return f"{self.model}, {one.ranks} x {self.cluster.name}{split}{again}{fp8}, {length}, {one.system.name}"


def rows(file: Path = FILE) -> Iterator[Row]:
    """All of them. Which half a row belongs to is a matter of its configuration's hash."""
    with file.open(encoding="utf-8", newline="") as lines:
        for fields in csv.DictReader(line for line in lines if not line.startswith("#")):
            yield _row(fields)


def _row(fields: dict[str, str]) -> Row:
    def number(key: str, default: float = 1) -> Any:
        return float(fields[key]) if fields[key] else default

    model, system = fields["model"], SYSTEMS[fields["system"]]
    length, source_length = int(number("length")), int(number("source_length", 0))
    shape = MODELS[model]
    if model.startswith("mpt"):
        shape = replace(shape, positions=length)
    if fields["fp8"]:
        system = replace(system, fp8=True)
    cluster = load_cluster(fields["cluster"])
    if fields["gpus_per_node"]:
        cluster = replace(cluster, gpus_per_node=int(number("gpus_per_node")))
    if fields["gbit"]:
        cluster = replace(cluster, between_bandwidth=number("gbit") / 8 * 1e9)
    layout = Layout(
        ranks=int(number("gpus")),
        tensor=int(number("tensor")),
        context=int(number("context")),
        pipeline=int(number("pipeline")),
        interleave=int(number("interleave")),
        shards=int(number("shards")) if fields["shards"] else None,
        zero_stage=int(number("stage", 0)),
        recompute=fields["recompute"],  # type: ignore[arg-type]
        recompute_every=int(number("every")),
        micro_size=number("micro"),
        accumulation=number("accumulation"),
        source_length=source_length,
        target_length=length,
        precision=fields["precision"],  # type: ignore[arg-type]
        system=system,
    )
    key = ",".join(value for name, value in fields.items() if name not in ("unit", "value"))
    first = hashlib.sha256(key.encode()).digest()[0]
    return Row(fields["source"], model, shape, layout, cluster, fields["unit"], number("value"), first % 2 == 0)
