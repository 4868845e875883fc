"""DeepSpeed ZeRO behind the engine's contract; the only importer of `deepspeed`.

DeepSpeed averages gradients over ranks and divides by the accumulation; the contract sums. So the loss is scaled by
the world size here and the division by accumulation is switched off. Accumulation boundaries are DeepSpeed's own
(`set_gradient_accumulation_boundary`).
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from trainer import distributed, sections
from trainer.engine import nvme
from trainer.engine.base import BuildModel, Fragment
from trainer.engine.compiled import compile_module
from trainer.engine.ds_config import bucket_elements, with_buckets
from trainer.engine.optimizer_state import (
    evaluation_mode,
    frozen_whole,
    get_step,
    materialise_state,
    passes,
    set_step,
    squares_of,
    tensor_states,
)
from trainer.engine.plain import BuildOptimizer
from trainer.errors import SetupError
from trainer.optim import set_learning_rate
from trainer.parallel.layout import Layout
from trainer.parallel.slices import Slices, of_whole
from trainer.tasks import Batch, LossSums, Task

# DeepSpeed calls collectives by names that torch has renamed; nothing a user could mend.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import deepspeed
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.runtime.utils import all_gather_dp_groups
    from deepspeed.runtime.zero import partitioned_param_coordinator

# Its shared-memory collectives would be compiled at first use (a minute), and were no faster than gloo's on 2 cores.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Where a piece of a parameter lives: `numel` elements from `start` of the parameter, at `offset` in `flat`
    (fp32)."""

    parameter: str
    shape: tuple[int, ...]
    start: int
    flat: torch.Tensor
    offset: int
    numel: int


def _forget_groups() -> None:
    """DeepSpeed keeps process groups in globals, where the next job of a sweep would find those of this one."""
    if deepspeed.comm.comm.cdb is not None:  # each engine of the job asks for it
        deepspeed.comm.destroy_process_group()
        deepspeed.comm.comm.cdb = None


@contextmanager
def trusting_ranks() -> Iterator[None]:
    """Inside, DeepSpeed does not ask whether other ranks go through the model in the same order: for a rank that has
    none beside it (`launch.planner.count`)."""
    usual = partitioned_param_coordinator.assert_ints_same_as_other_ranks
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda numbers: None
    try:
        yield
    finally:
        partitioned_param_coordinator.assert_ints_same_as_other_ranks = usual


class _Grid:
    """The layout as DeepSpeed asks for it ("mpu"): what it calls data parallel are the ranks that share a shard."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def get_data_parallel_group(self) -> Any:
        return self._layout.shard_group

    def get_data_parallel_rank(self) -> int:
        return self._layout.shard_rank

    def get_data_parallel_world_size(self) -> int:
        return self._layout.shards

    def get_model_parallel_group(self) -> Any:
        return self._layout.tensor_group

    def get_model_parallel_rank(self) -> int:
        return self._layout.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self._layout.tensor


def _keep_while_recomputing(coordinator: Any) -> None:
    """Let the parameters of a layer that the backward pass computes again stay until their gradients are there.

    ZeRO-3's hooks would give them back after the repeated forward pass, before autograd compares gradients with them.
    """
    release = coordinator.release_sub_module

    def release_after_use(module: torch.nn.Module, forward: bool = False) -> None:
        recomputing = forward and torch._C._current_graph_task_id() != -1  # a forward pass within a backward pass
        if not recomputing:
            release(module, forward)

    coordinator.release_sub_module = release_after_use


def _numel(parameter: Any) -> int:
    """Of the whole parameter, also where ZeRO-3 has taken it apart."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _reduce_in_pieces(engine: Any, elements: int) -> None:
    """Let ZeRO-1 in bf16 send its fp32 sums so many elements at a time: of each tensor that is sent it makes a copy in
    fp32 and one in bf16, and the sums of all matrices are one tensor."""
    optimizer = engine.optimizer
    whole = optimizer.get_grads_for_reduction

    def pieces() -> tuple[list[torch.Tensor], dict[str, Any]]:
        sums, experts = whole()
        return [piece for one in sums for piece in one.split(elements)], experts

    optimizer.get_grads_for_reduction = pieces
    engine.allreduce_gradients = partial(engine.allreduce_gradients, bucket_size=0)  # each by itself


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The tensors one after the other, as one; where they lie so in memory (gradients of a ZeRO-3 sub-group that are
    all trained), without a copy."""
    place, storage = tensors[0].storage_offset(), tensors[0].untyped_storage()._cdata
    for tensor in tensors:
        joined = tensor.untyped_storage()._cdata == storage and tensor.storage_offset() == place
        if not joined or not tensor.is_contiguous():
            return torch.cat([each.flatten() for each in tensors])
        place += tensor.numel()
    return tensors[0].as_strided((place - tensors[0].storage_offset(),), (1,))


def _prepare_nvme(path: str) -> None:
    """Raises SetupError where DeepSpeed could not compile what reads and writes asynchronously, or not write."""
    if not AsyncIOBuilder().is_compatible():
        raise SetupError(
            "Offloading to nvme reads and writes with libaio, and its headers or a C++ compiler are missing; install"
            " them (Debian, Ubuntu: apt-get install libaio-dev g++), or offload to cpu: engine=zero3_offload."
        )
    nvme.claim_folder(path, distributed.rank())


class ZeroEngine:
    """See `trainer.engine.base.Engine`."""

    def __init__(
        self,
        build_model: BuildModel,
        build_optimizer: BuildOptimizer,
        ds_config: dict[str, Any],
        compiled: bool = False,
        layout: Layout | None = None,
        slices: Slices | None = None,
        nvme_path: str | None = None,
    ) -> None:
        """`build_model` runs inside `deepspeed.zero.Init` for stage 3, which partitions each module as soon as it
        exists. layout, slices: where the model is split over ranks (see `trainer.parallel`). nvme_path: the folder of
        what is offloaded to a disk."""
        if nvme_path is not None:
            _prepare_nvme(nvme_path)
        self._layout = layout or Layout(distributed.rank(), distributed.world_size())
        self._slices = slices if slices is not None else {}
        grid = _Grid(self._layout) if self._layout.shard_group is not None else None
        distributed.before_leaving(_forget_groups)
        zero: dict[str, Any] = ds_config["zero_optimization"]
        self.stage: int = zero["stage"]
        self.ranks_must_step_together = self.stage == 3
        # on a disk, they are in memory while they are asked for
        self.fragments_stay = zero.get("offload_optimizer", {}).get("device") != "nvme"
        if zero.get("offload_param", {}).get("device") == "nvme":
            with torch.device("meta"):
                zero["offload_param"] |= nvme.parameter_buffers(build_model(), self._layout.shards)
        with deepspeed.zero.Init(
            data_parallel_group=self._layout.shard_group,
            config_dict_or_path=ds_config,
            enabled=self.stage == 3,
            mpu=grid,
        ):
            self.module = build_model()
        if compiled:
            compile_module(self.module)
        trained = sum(_numel(parameter) for parameter in self.module.parameters() if parameter.requires_grad)
        ds_config = with_buckets(ds_config, trained)
        optimizer = build_optimizer(self.module.named_parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=self.module, optimizer=optimizer, config=ds_config, dist_init_required=False, mpu=grid
            )
        if self.stage == 3:
            _keep_while_recomputing(self._optimizer.parameter_offload.get_param_coordinator())
            self._optimizer.flatten = _flat
        if hasattr(self._optimizer, "get_grads_for_reduction"):
            _reduce_in_pieces(self._engine, round(bucket_elements(trained)))
        self.model: torch.nn.Module = self._engine
        self._base_optimizer: torch.optim.Optimizer = self._optimizer.optimizer
        self.skipped_steps = 0
        self.squares: Mapping[str, float] = {}
        if hasattr(self._optimizer, "loss_scaler"):
            self._optimizer.loss_scaler.raise_error_at_min_scale = False  # `trainer.guards.anomalies` sees to it

    def forward_backward(self, task: Task, batch: Batch, scale: float, last: bool) -> LossSums:
        """See the contract."""
        self._engine.set_gradient_accumulation_boundary(last)
        sums = task.loss(self.model, batch)
        sections.enter("backward")
        self._engine.backward(sums.objective * (scale * self._layout.shards), scale_wrt_gas=False)
        return sums

    def step(self, lr: float, max_norm: float = math.inf, measure: bool = False) -> float:
        """See the contract."""
        set_learning_rate(self._base_optimizer, lr)
        self.squares = {}
        with self._updating_up_to(max_norm, measure):
            self._engine.step()
        self.skipped_steps += not passes(self._norm(), max_norm)
        return self._norm()

    def _norm(self) -> float:
        return float(self._optimizer._global_grad_norm or 0.0)

    @contextmanager
    def _updating_up_to(self, max_norm: float, measure: bool) -> Iterator[None]:
        """Inside, the optimizer in DeepSpeed's hands does nothing for a larger gradient, and, to `measure`, looks at
        what it is given.

        Every stage knows the norm before it calls the optimizer, writes masters into parameters after it, which changes
        nothing then, and clears the gradients.
        """
        optimizer: Any = self._base_optimizer
        update = optimizer.step

        def step(*_: Any) -> None:
            if measure:
                self._add_squares()
            if passes(self._norm(), max_norm):
                update()

        optimizer.step = step
        try:
            yield
        finally:
            del optimizer.step

    def _add_squares(self) -> None:
        """Measure the gradients that lie ready for the optimizer: of a parameter group, or a sub-group in stage 3."""
        flats = [flat for group in self._base_optimizer.param_groups for flat in group["params"]]
        pieces = [
            (piece.parameter, flat.grad.narrow(0, piece.offset, piece.numel))
            for flat in flats
            if flat.grad is not None
            for piece in self._pieces(flat)
            if piece.numel and self._layout.saves(piece.parameter in self._slices)
        ]
        self.squares = {**self.squares, **squares_of(pieces)}

    def _flats(self) -> list[torch.Tensor]:
        """The fp32 masters of this rank: one flat tensor a parameter group (a sub-group in stage 3)."""
        for attribute in (
            "fp32_partitioned_groups_flat",
            "fp32_groups_flat_partition",
            "single_partition_of_fp32_groups",
        ):
            if hasattr(self._optimizer, attribute):
                return list(getattr(self._optimizer, attribute))
        raise AssertionError(f"no fp32 partitions in {type(self._optimizer).__name__}")

    def _pieces(self, of: torch.Tensor) -> Iterator[_Piece]:
        """What stands in the flat tensor `of`."""
        flats = self._flats()
        parameter: Any  # DeepSpeed hangs its own attributes on parameters
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.stage == 3:
                group, offset, size = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
                start = self._layout.shard_rank * parameter.ds_tensor.ds_numel
                numel = max(0, min(size, parameter.ds_numel - start))  # the last partition is padded
                if flats[group] is of:
                    yield _Piece(name, tuple(parameter.ds_shape), start, flats[group], offset, numel)
            elif parameter._hp_mapping is not None:
                mapping = parameter._hp_mapping
                where, address = mapping.lp_fragment_address, mapping.hp_fragment_address
                flat = flats[mapping.param_group_index]
                if flat is of:
                    yield _Piece(name, tuple(parameter.shape), where.start, flat, address.start, address.numel)

    def fragments(self) -> Iterator[Fragment]:
        """See the contract: exactly what ZeRO left on this rank."""
        for group, whole in enumerate(self._flats()):
            with nvme.in_memory(self._optimizer, group):
                materialise_state(self._base_optimizer, [whole])
                states = [("master", whole), *tensor_states(self._base_optimizer.state[whole])]
                for piece in self._pieces(whole):
                    own = self._layout.saves(piece.parameter in self._slices)
                    for key, flat in states if piece.numel else []:
                        view = flat.detach().narrow(0, piece.offset, piece.numel)
                        fragment = Fragment(piece.parameter, key, piece.start, piece.shape, view, saved=own)
                        yield from of_whole(fragment, self._slices)

    def frozen(self) -> Iterator[Fragment]:
        """See the contract."""
        if self.stage < 3:
            yield from frozen_whole(self.module)
            return
        yield from _untrained_partitions(self.module, self._layout.shard_rank)

    def scalars(self) -> dict[str, float]:
        """See the contract."""
        scale = float(getattr(self._optimizer, "loss_scale", 1.0))
        return {"step": get_step(self._base_optimizer), "loss_scale": scale}

    def after_load(self, scalars: Mapping[str, float]) -> None:
        """See the contract."""
        for flat in self._flats():
            set_step(self._base_optimizer, flat, scalars["step"])
        optimizer = self._optimizer
        if self.stage == 3:
            optimizer._partition_all_parameters()  # parameters kept gathered would keep their old values
            for group in range(len(self._flats())):
                with nvme.in_memory(optimizer, group):
                    optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()
        else:
            for parts, flat in zip(optimizer.parallel_partitioned_bit16_groups, self._flats(), strict=True):
                parts[self._layout.shard_rank].data.copy_(flat.data)
            all_gather_dp_groups(
                groups_flat=optimizer.bit16_groups_flat,
                partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
                dp_process_group=optimizer.real_dp_process_group,
                start_alignment_factor=optimizer.nccl_start_alignment_factor,
                allgather_bucket_size=optimizer.allgather_bucket_size,
            )

    def evaluating(self) -> AbstractContextManager[None]:
        """See the contract."""
        return evaluation_mode(self._engine)


def _untrained_partitions(module: torch.nn.Module, rank: int) -> Iterator[Fragment]:
    """This rank's pieces of the parameters that ZeRO-3 has partitioned and that are not trained."""
    parameter: Any
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            start = rank * parameter.ds_tensor.ds_numel
            numel = max(0, min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start))
            with nvme.present(parameter):
                view = parameter.ds_tensor.data.narrow(0, 0, numel)
                yield Fragment(name, "frozen", start, tuple(parameter.ds_shape), view, saved=False)


class ShardedModel:
    """A model to be used, its parameters spread over the ranks (ZeRO-3), which must step together."""

    def __init__(self, build_model: BuildModel, ds_config: dict[str, Any]) -> None:
        distributed.before_leaving(_forget_groups)
        with deepspeed.zero.Init(config_dict_or_path=ds_config):
            self.module = build_model()
        self.module.requires_grad_(False).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            deepspeed.initialize(model=self.module, config=ds_config, dist_init_required=False)

    def fragments(self) -> Iterator[Fragment]:
        """This rank's pieces, to be filled before the first use."""
        return _untrained_partitions(self.module, distributed.rank())
