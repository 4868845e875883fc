"""How a model is spread over ranks and run: parallelism, sharding, recomputing, batches, and what the software does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Recomputing = Literal["none", "selective", "full"]
Place = Literal["none", "cpu", "nvme"]
HeadLoss = Literal["fused", "kernel", "compiled", "eager"]


@dataclass(frozen=True, slots=True)
class System:
    """What a training system holds and sends, in bytes a parameter, and how its kernels are made.

    The defaults are those of `trainer.engine` in bf16; `trainer.estimate.systems` has those of systems whose
    measurements are published.
    """

    name: str = "ours"
    working: float = 2.0
    """Of the parameters that products take; what ZeRO-3 gathers."""
    held: float = 2.0
    """Of the parameters between two uses; unlike `working` where a sharded fp32 copy is cast when it is gathered."""
    master: float = 4.0
    """Of fp32 copies beside them."""
    gradient: float = 4.0
    """Of the gradients that wait for the update."""
    arriving: float = 2.0
    """Of the gradients as the backward pass makes them, which are held until they are summed or sent."""
    moments: float = 8.0
    """Of the optimizer's states."""
    sent_gradient: float = 2.0
    """Of gradients on the wire."""
    whole_gradients: bool = False
    """Gradients are whole on every rank while micro-batches are summed, although parameters are sharded."""
    reduces_every_micro_batch: bool = True
    """Sharded gradients are sent after every micro-batch instead of once a step."""
    all_reduces_gradients: bool = False
    """Sharded gradients are sent by an all-reduce where a reduce-scatter would do."""
    live_elements: float = 1e9
    """ZeRO-3: parameters gathered at most; what is below stays from forward to backward. 0: a layer and the next."""
    bucket_elements: float = 5e8
    """ZeRO: elements of the buffer in which gradients are collected to be sent."""
    head_loss: HeadLoss = "fused"
    """Logits: a chunk at a time (`trainer.cross_entropy`), or all, with as many copies as a fused kernel, a compiler or
    plain operations need."""
    attention: Literal["flash", "flash1", "cudnn", "unfused", "cpu"] = "cudnn"
    """The kernel family: FlashAttention-2; FlashAttention in Triton of 2022-23; cuDNN's, which PyTorch takes on Hopper
    (elsewhere the same as "flash"); plain products; what ours does on a CPU."""
    compiled: bool = False
    """Element-wise operations are fused by a compiler or by hand."""
    early_stop: bool = False
    """Recomputing a layer ends with the last input that its backward pass needs, before the last product."""
    selective: Literal["operations", "half", "attention"] = "operations"
    """Selective recomputing: all but products and attention; as that, and every second product too (torchtitan);
    attention's scores alone (Megatron-LM)."""
    sequence_norms: bool = False
    """Tensor parallel ranks share the positions between products too (Korthikanti et al. 2022)."""
    splits_vocabulary: Literal["none", "tables", "logits"] = "none"
    """What tensor parallel ranks share besides the layers: nothing, the token table and head, these and the logits."""
    gate_apart: bool = True
    """The two first products of a gated feed-forward, and queries and keys of cross-attention, each sum the
    gradients of their inputs over tensor parallel ranks."""
    fused_projection: bool = True
    """Queries, keys and values are one product, whose result is kept as long as the values in it."""
    autocast: bool = False
    """Only products are in the narrow precision: all else passes over fp32."""
    overlaps: bool = False
    """Collectives of ZeRO run beneath computation."""
    early_hopper: bool = False
    """Products of matrices on Hopper by libraries from before its own kernels were in cuBLAS (2023-24)."""
    fp8: bool = False
    """Products of matrices in float8."""


OURS = System()


@dataclass(frozen=True, slots=True)
class Layout:
    """How a run is spread. ranks = data x sequence x context x tensor x pipeline.

    tensor: ranks that share each matrix. sequence: that share positions by exchanging heads (Ulysses). context: that
    share positions and pass keys around (ring attention). pipeline, interleave: stages, and how many pieces of the
    model each has (Narayanan et al. 2021). shards: ranks over which ZeRO shards, None: all that hold the same matrices.
    micro_size: samples that a group of ranks passes forward at once; accumulation: micro-batches a step; source_length,
    target_length: positions of a sample, padding included (packed: of a row). micro_size may be a fraction: a mean.
    target_fraction: of target positions, those that carry loss. recompute_every: only each so many-th layer is
    recomputed. offload_activations: what is recomputed from waits in host memory. varying_batches: micro-batches of the
    run, where each is as long as its samples are (the lengths are then the longest); 0: all are of one shape.
    """

    ranks: int = 1
    tensor: int = 1
    sequence: int = 1
    context: int = 1
    pipeline: int = 1
    interleave: int = 1
    shards: int | None = None
    zero_stage: int = 0
    offload_optimizer: Place = "none"
    offload_parameters: Place = "none"
    offload_activations: Place = "none"
    recompute: Recomputing = "none"
    recompute_every: int = 1
    micro_size: float = 1.0
    accumulation: float = 1.0
    source_length: int = 0
    target_length: int = 0
    target_fraction: float = 1.0
    varying_batches: float = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    ema: bool = False
    system: System = field(default=OURS)

    @property
    def data(self) -> int:
        """Groups of ranks that work on samples of their own."""
        return self.ranks // (self.tensor * self.sequence * self.context * self.pipeline)

    @property
    def sharing(self) -> int:
        """Ranks that hold the same matrices."""
        return self.ranks // (self.tensor * self.pipeline)

    @property
    def zero_ranks(self) -> int:
        """Ranks over which ZeRO shards."""
        return self.shards or self.sharing

    @property
    def global_size(self) -> float:
        """Samples of a step."""
        return self.micro_size * self.accumulation * self.data

    @property
    def positions(self) -> float:
        """Positions of a step, source and target, over all ranks."""
        return self.global_size * (self.source_length + self.target_length)
