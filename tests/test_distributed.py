"""How the ranks of a start find each other where a store remembers those of earlier ones."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from trainer import distributed
from trainer.distributed import _meet


def test_the_ranks_of_every_start_share_a_name_of_their_own(free_port: int) -> None:
    """Three starts on a store that outlives them, the second of more ranks; words of the gone mislead nobody."""
    seconds = timedelta(seconds=60)
    names = set()
    server = dist.TCPStore("127.0.0.1", free_port, is_master=True, timeout=seconds)
    for world_size in (3, 4, 2):
        clients = [dist.TCPStore("127.0.0.1", free_port, timeout=seconds) for _ in range(world_size)]
        with ThreadPoolExecutor(world_size) as ranks:
            met = set(ranks.map(lambda rank, world_size=world_size, clients=clients: _meet(
                clients[rank], rank, world_size, 60.0), range(world_size)))  # fmt: skip
        assert len(met) == 1
        names |= met
    assert len(names) == 3 and server.num_keys() > 0


def test_a_rank_that_does_not_come_is_named(free_port: int) -> None:
    store = dist.TCPStore("127.0.0.1", free_port, is_master=True, timeout=timedelta(seconds=60))
    store.set("word/1", "of a rank that has gone")
    with pytest.raises(dist.DistStoreError, match=r"ranks \[1\] did not come within 0.05 s"):
        _meet(store, 0, 2, 0.05)


def _talk(rank: int, ranks: int, port: int, as_needed: bool) -> None:
    """One rank: every small collective, on numbers whose order of summing shows in the last bit."""
    with pytest.MonkeyPatch.context() as patch:
        facts = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for name, value in facts.items():
            patch.setenv(name, str(value))
        patch.setattr(distributed, "_MESH_RANKS", 0 if as_needed else 256)
        patch.delenv("TORCH_GLOO_LAZY_INIT", raising=False)
        with distributed.process_group(timeout_seconds=60):
            tenths = [0.1 * (one + 1) for one in range(ranks)]
            total = distributed.all_reduce_sum([tenths[rank], 1.0])
            assert math.isclose(total[0], sum(tenths)) and total[1] == ranks
            assert len(set(distributed.all_gather_objects(total[0]))) == 1
            assert distributed.all_reduce_max([rank, -rank]) == [ranks - 1, 0]
            assert not distributed.every_rank(rank != ranks - 1)
            assert distributed.gather_objects(rank) == ([*range(ranks)] if rank == 0 else [])
            assert distributed.broadcast_object(rank) == 0


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "as_needed"), [(3, False), (5, True)])
def test_every_rank_gets_the_same_of_all(ranks: int, as_needed: bool, free_port: int) -> None:
    """Also of a number that is no power of two, and where connections are made as they are needed."""
    mp.spawn(_talk, (ranks, free_port, as_needed), ranks)
