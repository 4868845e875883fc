"""The process group, and the few collectives on plain Python values that the trainer needs.

Every function works in a single process without a process group, so callers never ask whether there is one.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

_Operation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of two tensors, element by element."""

_MESH_RANKS = 256
"""Up to as many, every rank connects to every other when the process group is made."""

_farewells: list[Callable[[], None]] = []


def rank() -> int:
    """This process's rank in the whole job; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes in the whole job; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """The accelerator of this process by LOCAL_RANK, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def launched_ranks() -> int:
    """The number of processes that the launcher (torchrun, deepspeed, srun) announced in WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group(always: bool = False, timeout_seconds: float = 1800.0) -> Iterator[None]:
    """Join the launcher's process group (NCCL on GPUs, gloo on CPU) and leave it at the end.

    always: make a group of one even without a launcher, as DeepSpeed needs; a `HashStore` stands in for the rendezvous,
    so no port is taken.
    """
    if launched_ranks() == 1 and not always:
        yield
        return
    where = device()
    if where.type == "cuda":
        torch.cuda.set_device(where)
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if launched_ranks() > _MESH_RANKS:  # a collective then connects the few that it needs
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    if launched_ranks() == 1:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it there
        store = torch._C._distributed_c10d.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        whole, own_rank, size = next(rendezvous("env://", timeout=timeout))
        ours = torch._C._distributed_c10d.PrefixStore(_meet(whole, own_rank, size, timeout_seconds), whole)
        dist.init_process_group(backend, store=ours, rank=own_rank, world_size=size, timeout=timeout)
    try:
        yield
    finally:
        leave()


def leave() -> None:
    """Give up the process group, after what libraries keep in it (see `before_leaving`)."""
    while _farewells:
        _farewells.pop()()
    if dist.is_initialized():
        dist.destroy_process_group()


def before_leaving(farewell: Callable[[], None]) -> None:
    """Call `farewell` at the end of the process group, for a library that keeps groups of its own in it."""
    _farewells.append(farewell)


def _meet(store: torch._C._distributed_c10d.Store, rank: int, world_size: int, timeout_seconds: float) -> str:
    """A name that the ranks of this start share with no rank of an earlier one.

    torchrun's store outlives restarts and the jobs of a sweep, and with them the addresses of ranks that are gone; and
    its agents count restarts each for itself. So every rank writes a word of its own, and rank 0 answers each word that
    it finds with the name, until every rank has confirmed it: a word of a rank that is gone brings no confirmation.
    Raises DistStoreError where a rank does not come.
    """
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"word/{rank}", name)
        shared: str = store.get(f"answer/{name}").decode()
        store.set(f"{shared}/{rank}", "")
        return shared
    missing = set(range(1, world_size))
    deadline = time.monotonic() + timeout_seconds
    while missing:
        for other in sorted(missing):
            if store.check([f"word/{other}"]):
                store.set(f"answer/{store.get(f'word/{other}').decode()}", name)
            if store.check([f"{name}/{other}"]):
                missing.remove(other)
        if missing and time.monotonic() > deadline:
            raise dist.DistStoreError(f"ranks {sorted(missing)} did not come within {timeout_seconds:g} s")
        time.sleep(0.01)
    return name


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Element-wise sum over all ranks (float64: counts stay exact to 2^53)."""
    return _all_reduce(values, torch.add)


def all_reduce_max(values: Sequence[float]) -> list[float]:
    """Element-wise maximum over all ranks."""
    return _all_reduce(values, torch.maximum)


def all_reduce_sums(values: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Element-wise sums over all ranks of several lists, each of one length on all ranks, in one exchange."""
    sums = iter(all_reduce_sum([value for part in values.values() for value in part]))
    return {name: list(islice(sums, len(part))) for name, part in values.items()}


def every_rank(flag: bool) -> bool:
    """Whether `flag` is true on every rank."""
    return all_reduce_max([0.0 if flag else 1.0]) == [0.0]


def _all_reduce(values: Sequence[float], operation: _Operation) -> list[float]:
    """Recursive doubling (Thakur et al. 2005, section 4.3): 2 + log2(ranks) messages one after the other, where gloo's
    ring, made for large tensors, sends 2 x ranks. `operation` commutes, so all ranks get the same bits."""
    if world_size() == 1:
        return list(values)
    own, ranks = rank(), world_size()
    tensor = torch.tensor(values, dtype=torch.float64)
    theirs = torch.empty_like(tensor)
    doubling = 1 << (ranks.bit_length() - 1)  # ranks that double; each of the others has one of them speak for it
    if own >= doubling:
        dist.send(tensor, own - doubling)
        dist.recv(tensor, own - doubling)
        return [float(value) for value in tensor.tolist()]
    if own + doubling < ranks:
        dist.recv(theirs, own + doubling)
        tensor = operation(tensor, theirs)
    distance = 1
    while distance < doubling:
        sent = dist.isend(tensor, own ^ distance)
        dist.recv(theirs, own ^ distance)
        assert sent is not None, "this rank is of the group"
        sent.wait()
        tensor = operation(tensor, theirs)
        distance *= 2
    if own + doubling < ranks:
        dist.send(tensor, own + doubling)
    return [float(value) for value in tensor.tolist()]


def all_gather_objects(value: T) -> list[T]:
    """Every rank's (small, picklable) value, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list[T | None] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered  # type: ignore[return-value]  # every slot is filled now


def gather_objects(value: T) -> list[T]:
    """Every rank's (small, picklable) value, in the order of ranks, on rank 0; [] on the others."""
    if world_size() == 1:
        return [value]
    gathered: list[T | None] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered or []  # type: ignore[return-value]  # every slot is filled now


def broadcast_object(value: T) -> T:
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        all_reduce_sum([0.0])


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 alone and give its value to every rank.

    What it raises is raised on every rank, so that no rank waits for one that has given up.
    """
    outcome: tuple[T | None, Exception | None] = (None, None)
    if rank() == 0:
        try:
            outcome = (action(), None)
        except Exception as error:
            if world_size() == 1:
                raise
            outcome = (None, error)
    value, failure = broadcast_object(outcome)
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]  # the action's own value
